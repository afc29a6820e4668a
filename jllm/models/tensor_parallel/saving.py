"""Weights of a stage that lies in slices on several ranks, written into one Hugging Face folder by all of them.

The first of them writes the headers, and makes the files as long as they will be; then each writes its slices to their
places. What several have alike is written by the first one. Nothing is gathered.

Names and the layout of a family's published files come from the same conversion as always, run on the slices, and on
whole tensors without memory. Where it splits a packed parameter, each part is cut evenly along the axis that differs.

Guarantees: the files that one process with the whole stage writes.
Cost: one tensor at a time where the dtype changes; a write a row of a tensor that is not cut along its first axis.
"""

import dataclasses
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from jllm import atomic
from jllm.models.pipeline.carving import structure_of
from jllm.models.pipeline.span import StageSpan
from jllm.models.weights.kept import KeptDtypes
from jllm.models.weights.saving import SHARD_BYTES, STAGE_METADATA, parts_of, published_tensors, stage_file_name
from jllm.models.weights.streamed_file import tensor_bytes
from jllm.models.weights.tensor_file import DTYPE_NAMES, encoded_header
from jllm.parallel.tensor.slices import Slice, chunk, slice_of, whole_shape


@dataclass(frozen=True, kw_only=True)
class SlicedTensor:
    """A tensor of the folder, and what this rank has of it.

    Attributes:
        name: published.
        dtype: in the file.
        shape: of the whole tensor.
        held: this rank's slice.
        place: where that belongs; None where this rank has all of it.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    held: Tensor
    place: Slice | None

    @property
    def nbytes(self) -> int:
        """Of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    def runs(self) -> Iterator[tuple[int, Tensor]]:
        """What this rank has, in runs of the whole tensor: the first element's number, and the elements in order."""
        if self.place is None:
            yield 0, self.held
            return
        axis = self.place.axis
        inner = math.prod(self.shape[axis + 1 :])
        rows = self.held.reshape(-1, self.held.shape[axis], inner)
        for number, row in enumerate(rows):
            local = 0
            for start, stop in self.place.ranges:
                yield (number * self.shape[axis] + start) * inner, row[local : local + stop - start]
                local += stop - start


@dataclass(frozen=True, kw_only=True)
class SlicedFile:
    """A file of a stage, that all of its ranks write together."""

    name: str
    tensors: Sequence[SlicedTensor]

    def _header(self) -> tuple[bytes, list[int]]:
        header: dict[str, Any] = {"__metadata__": dict(STAGE_METADATA)}
        places, position = [], 0
        for tensor in self.tensors:
            end = position + tensor.nbytes
            entry = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [position, end]}
            header[tensor.name] = entry
            places.append(position)
            position = end
        encoded: bytes = encoded_header(header)
        return encoded, [*(len(encoded) + place for place in places), len(encoded) + position]

    def begin(self, folder: Path) -> None:
        """Write the header, and make room for the rest. One rank does it, before the others write."""
        header, places = self._header()
        path = folder / self.name
        with atomic.naming(path), path.open("wb") as file:
            file.write(header)
            file.truncate(places[-1])

    def write(self, folder: Path, *, is_first: bool) -> None:
        """Write this rank's slices; with `is_first` also what all ranks of the stage have."""
        _, places = self._header()
        path = folder / self.name
        descriptor = os.open(path, os.O_WRONLY)
        try:
            with atomic.naming(path):
                for tensor, begin in zip(self.tensors, places, strict=False):
                    if tensor.place is None and not is_first:
                        continue
                    stored = tensor.held.detach().to(tensor.dtype).cpu().contiguous()
                    for place, run in _with_held(tensor, stored).runs():
                        _write_all(descriptor, tensor_bytes(run), begin + place * tensor.dtype.itemsize)
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sliced_files(
    model: PreTrainedModel,
    span: StageSpan,
    *,
    dtype: torch.dtype,
    source: Path | None,
    rank: int,
    ranks: int,
    shard_bytes: int = SHARD_BYTES,
) -> list[SlicedFile]:
    """The files of a stage, by the names that `stage_files` has for them.

    Args:
        model: of this rank.
        span: of the stage.
        dtype, source: as for `stage_files`.
        rank: this one's place among those of the stage.
        ranks: how many there are.
        shard_bytes: of a file, about.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    left_out = {*(copy for copy, _ in structure_of(model).tied), *(model._keys_to_ignore_on_save or ())}
    held = {name: tensor for name, tensor in model.state_dict().items() if name not in left_out}
    shapes = {name: whole_shape(parameters.get(name, tensor)) for name, tensor in held.items()}
    whole = {name: torch.empty(shapes[name], dtype=tensor.dtype, device="meta") for name, tensor in held.items()}
    kept = KeptDtypes(model, dtype, source)
    kept.look_at(held)
    published, wholes = published_tensors(model, held), published_tensors(model, whole)
    assert published.keys() == wholes.keys()

    by_place = {(tensor.data_ptr(), tuple(tensor.shape)): parameters.get(name) for name, tensor in held.items()}

    def tensor_of(name: str) -> SlicedTensor:
        local, shape = published[name], tuple(wholes[name].shape)
        # A parameter may be published as it is, by another name.
        own = by_place.get((local.data_ptr(), tuple(local.shape)), parameters.get(name))
        if own is not None and tuple(own.shape) == tuple(local.shape):
            place = slice_of(own)
        else:
            place = _even_slice(shape, tuple(local.shape), rank, ranks)
        return SlicedTensor(name=name, dtype=kept.of(name, local), shape=shape, held=local, place=place)

    return [
        SlicedFile(name=stage_file_name(span.index, part), tensors=[tensor_of(name) for name in names])
        for part, names in enumerate(parts_of(wholes, shard_bytes))
    ]


def _even_slice(shape: tuple[int, ...], local: tuple[int, ...], rank: int, ranks: int) -> Slice | None:
    """Where a slice of this shape belongs, that a conversion made of others."""
    axes = [axis for axis, (one, other) in enumerate(zip(shape, local, strict=True)) if one != other]
    if not axes:
        return None
    [axis] = axes
    start, stop = chunk(shape[axis], ranks, rank)
    assert stop - start == local[axis], (shape, local)
    return Slice(shape=shape, axis=axis, ranges=((start, stop),))


def _with_held(tensor: SlicedTensor, held: Tensor) -> SlicedTensor:
    return dataclasses.replace(tensor, held=held)


def _write_all(descriptor: int, content: Any, offset: int) -> None:
    left = memoryview(content)
    while left:
        written = os.pwrite(descriptor, left, offset)
        left, offset = left[written:], offset + written
