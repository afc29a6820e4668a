"""`jllm merge`: an adapter added to its model's weights, tensor by tensor; the model is never held.

Each changed tensor is read some rows at a time, changed in fp32 and rounded once to its own type. Where published
tensors are not the model's own (an expert each), the change is made in the model's layout and converted as transformers
converts weights. Of a tied pair with an adapter on one side both are written, and the new configuration unties them.

Guarantees: the merged model computes what peft computes with the adapter; all other tensors keep every byte and type.
A model in 4 or 8 bits becomes one in bf16. What is
added to never holds infinity or NaN: that is refused.
Cost: a pass over the model; the adapter, and of converted tensors the change of two groups, in fp32.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from jllm.errors import UserError
from jllm.models.adapters.low_rank import AdapterChanges, LowRank, read_changes
from jllm.models.weights.dequantised import plain_configuration, plain_tensors
from jllm.models.weights.rewritten import config_of, places_of, raw_config, set_everywhere, written_folder
from jllm.models.weights.saving import conversion_groups, published_tensors
from jllm.models.weights.source import bare_model, causal_class
from jllm.models.weights.streamed_file import (
    TORCH_TYPES,
    StoredTensor,
    StreamedTensor,
    computed,
    passed_on,
    row_blocks,
    stored_tensors,
)

USER = "jllm merge"
_OTHER_MODEL = "give the model that it was trained on"


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What came of it.

    Attributes:
        changed: tensors, of `total`.
        notes: for people, a line each.
    """

    changed: int
    total: int
    notes: tuple[str, ...]


def merge(base: Path, adapter: Path, output: Path, *, scale: float = 1.0) -> Merged:
    """Write `output`: the model in `base` with the adapter in `adapter`.

    Args:
        base: a Hugging Face folder; safetensors or pickled, plain or as bitsandbytes saved it.
        adapter: a peft folder.
        output: a new folder.
        scale: what is added is multiplied by it; -1 takes an adapter out again.

    Raises:
        UserError: the two do not fit, something in the adapter cannot be scaled, or a tensor is not where it should be.
    """
    raw = raw_config(base)
    is_quantised, plain = plain_configuration(raw, base)
    origin = config_of(plain)
    family = causal_class(origin)
    changes = read_changes(adapter, origin, family, user=USER)
    if scale != 1 and (found := changes.unlike_sums()):
        raise UserError(
            f"--scale {scale:g}: the adapter has {found}, which is merged as it is or not at all; leave it out"
        )
    files = plain_tensors(stored_tensors(base), base) if is_quantised else stored_tensors(base)
    model = bare_model(origin, family, dtype=torch.float32)
    merger = _Merger(model, changes, files, scale)
    written = [[each for tensor in tensors for each in merger.streamed(tensor)] for tensors in files]
    merger.check_complete(adapter)
    notes = []
    if merger.untied:
        plain = set_everywhere(plain, "tie_word_embeddings", False)
        if bare_model(config_of(plain), family, dtype=torch.float32).all_tied_weights_keys:
            raise UserError(
                f"{base} ties {' and '.join(merger.untied)} whatever its configuration says, and the adapter is not the"
                " same on both; nothing can be merged"
            )
        notes.append(f"{' and '.join(merger.untied)} are one tensor no longer: the adapter is not the same on both")
    if is_quantised:
        notes.append("the weights in few bits are bf16 now")
    with written_folder(base, output, written, plain if plain != raw else None, what="the merged model"):
        pass
    return Merged(changed=len(merger.changed), total=sum(map(len, written)), notes=tuple(notes))


class _Merger:
    """Which stored tensors change, and how.

    Args:
        model: without memory.
        changes: of the adapter.
        files: the base's.
        scale: of what is added.
    """

    def __init__(
        self, model: PreTrainedModel, changes: AdapterChanges, files: list[list[StoredTensor]], scale: float
    ) -> None:
        self._model, self._changes, self._scale = model, changes, scale
        self._stored = {tensor.name: tensor for tensors in files for tensor in tensors}
        self._places = places_of(model, self._stored)
        self._used: set[str] = set()
        self.changed: set[str] = set()
        self.untied: tuple[str, ...] = ()
        self._tied = dict(model.all_tied_weights_keys)
        self._stored_as = {place: name for name, (place, _) in self._places.items()}
        self._groups = {name: tuple(group) for group in conversion_groups(model).values() for name in group}
        self._pieces = functools.lru_cache(maxsize=2)(self._converted)

    def streamed(self, tensor: StoredTensor) -> Iterator[StreamedTensor]:
        """What is written for a stored tensor: itself, changed or not, and what was tied to it before."""
        place, is_converted = self._places[tensor.name]
        copies = [copy for copy, original in self._tied.items() if original == place]
        missing = [copy for copy in copies if copy not in self._stored_as]
        if any(self._touches(name) for name in (place, *copies)):
            if missing:
                self.untied = (place, *missing)
        else:
            missing = []
        if is_converted:
            yield self._of_group(tensor, place)
        else:
            yield self._changed(tensor, place, tensor.name)
        for copy in missing:
            yield self._changed(tensor, copy, copy)

    def check_complete(self, adapter: Path) -> None:
        """Raises:
        UserError: the adapter changes something that the files do not hold.
        """
        left = (self._changes.low_rank.keys() | self._changes.replaced.keys()) - self._used
        if left:
            raise UserError(f"--lora {adapter}: {min(left)} is in none of the base's files; {_OTHER_MODEL}")

    def _touches(self, place: str) -> bool:
        return place in self._changes.low_rank or place in self._changes.replaced

    def _changed(self, tensor: StoredTensor, place: str, name: str) -> StreamedTensor:
        """One that is the model's own: as it is, replaced, or with something added."""
        if not self._touches(place):
            return passed_on(tensor, name)
        self._used.add(place)
        self.changed.add(name)
        new = self._changes.replaced.get(place)
        if new is not None:
            self._check_shape(tensor, tuple(new.shape))
            if place not in self._changes.low_rank:
                return computed(name, _type_of(tensor), tensor.shape, lambda start, stop: new[start:stop])
        change = self._changes.low_rank[place]
        self._check_shape(tensor, change.shape)
        read = tensor.rows if new is None else lambda start, stop: new[start:stop]
        _check_copy(tensor, change)
        return computed(name, _type_of(tensor), tensor.shape, _finite(tensor, _sums(read, change, self._scale)))

    def _of_group(self, tensor: StoredTensor, place: str) -> StreamedTensor:
        """One that the model has in another layout, together with others."""
        group = self._groups[place]
        touched = [name for name in group if self._touches(name)]
        if not touched:
            return passed_on(tensor)
        for name in touched:
            change = self._changes.low_rank.get(name)
            if change is None or change.magnitude is not None:
                raise UserError(f"{name} is published in another layout ({tensor.name}), where only sums can be merged")
        shapes = self._piece_shapes(group)
        if shapes.get(tensor.name) != tensor.shape:
            # Something of the same place that the conversion has no part for, such as a bias of its own.
            raise UserError(f"{tensor.name}: the change of {touched[0]} has no part of the shape {list(tensor.shape)}")
        self._used.update(touched)
        self.changed.add(tensor.name)

        def rows(start: int, stop: int) -> Tensor:
            return tensor.rows(start, stop).float() + self._pieces(group)[tensor.name][start:stop]

        return computed(tensor.name, _type_of(tensor), tensor.shape, _finite(tensor, rows))

    def _piece_shapes(self, group: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
        known = self._model.state_dict()
        found = published_tensors(self._model, {name: known[name] for name in group})
        return {self._published(name): tuple(piece.shape) for name, piece in found.items()}

    def _converted(self, group: tuple[str, ...]) -> dict[str, Tensor]:
        """Published name → what is added to it, of a group that is converted together."""
        known = self._model.state_dict()
        changes = {}
        for name in group:
            change = self._changes.low_rank.get(name)
            shape = known[name].shape
            changes[name] = torch.zeros(shape) if change is None else self._scale * change.rows(0, shape[0])
        found = published_tensors(self._model, changes)
        return {self._published(name): piece for name, piece in found.items()}

    def _published(self, name: str) -> str:
        """A name as the files have it, with the prefix of the base model or without."""
        prefix = self._model.base_model_prefix + "."
        return next((each for each in (name, prefix + name, name.removeprefix(prefix)) if each in self._stored), name)

    def _check_shape(self, tensor: StoredTensor, shape: tuple[int, ...]) -> None:
        if tensor.shape != shape:
            raise UserError(
                f"{tensor.name} is {list(tensor.shape)}, the adapter's change of it {list(shape)}; {_OTHER_MODEL}"
            )


def _finite(tensor: StoredTensor, rows: Callable[[int, int], Tensor]) -> Callable[[int, int], Tensor]:
    """The same rows in the tensor's type, refused where that cannot hold them."""
    dtype = _type_of(tensor)

    def checked(start: int, stop: int) -> Tensor:
        made = rows(start, stop).to(dtype)
        if not torch.isfinite(made).all():
            raise UserError(
                f"{tensor.name} would hold infinity or NaN with the adapter in it, in {tensor.dtype}; give a smaller"
                " --scale, or a model that is finite, in a type with a larger range"
            )
        return made

    return checked


def _sums(read: Callable[[int, int], Tensor], change: LowRank, scale: float) -> Callable[[int, int], Tensor]:
    """The rows of a weight with a change, in fp32 or finer; DoRA's are those of the right norm."""

    def plain(start: int, stop: int) -> Tensor:
        held = read(start, stop)
        changed: Tensor = held.to(torch.promote_types(held.dtype, torch.float32)) + scale * change.rows(start, stop)
        return changed

    magnitude = change.magnitude
    if magnitude is None:
        return plain

    @functools.cache
    def norms() -> Tensor:
        squares: Any = sum(plain(*ends).double().square().sum(0) for ends in row_blocks(change.shape, 4))
        found: Tensor = squares.sqrt().float()
        return found

    def rows(start: int, stop: int) -> Tensor:
        changed = plain(start, stop)
        factor = magnitude / norms() if change.by_column else magnitude[start:stop, None] / _norms_of_rows(changed)
        rescaled: Tensor = changed * factor
        return rescaled

    return rows


def _norms_of_rows(matrix: Tensor) -> Tensor:
    found: Tensor = torch.linalg.norm(matrix, dim=1, keepdim=True)
    return found


def _check_copy(tensor: StoredTensor, change: LowRank) -> None:
    """Raises:
    UserError: the adapter holds the base's own weight, and another one.
    """
    if change.copy is None:
        return
    for start, stop in row_blocks(tensor.shape, 4):
        held = tensor.rows(start, stop)
        if not torch.equal(change.copy[start:stop].to(held.dtype), held):
            raise UserError(f"--lora: it has {tensor.name} itself, and another one than --model; {_OTHER_MODEL}")


def _type_of(tensor: StoredTensor) -> torch.dtype:
    dtype = TORCH_TYPES.get(tensor.dtype)
    if dtype is None or not dtype.is_floating_point or dtype.itemsize < 2:
        raise UserError(
            f"{tensor.name} is of type {tensor.dtype}, which nothing can be added to; give the model in bf16, fp16 or"
            " fp32"
        )
    return dtype
