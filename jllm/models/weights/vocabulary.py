"""A model with more ids: the rows of its embedding and its head, made from the mean of those that are used.

Rows beyond the ids that a tokenizer uses are padding; new ids take these first, and only then does the model grow.

Guarantees: rows that were used keep every byte, and so do all other tensors; a new row is the mean of the used rows,
summed in more than fp32 and rounded to the tensor's type; what was one tensor stays one. The new folder is there
completely or not at all.
Cost: a pass over the files in blocks, and one more over the embedding and the head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jllm.errors import UserError
from jllm.models.weights.rewritten import config_of, places_of, raw_config, set_everywhere, written_folder
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

SIZE = "vocab_size"


@dataclass(frozen=True, kw_only=True)
class Resized:
    """What came of it.

    Attributes:
        before, after: rows of the embedding.
        padding: new ids whose rows were there already.
        tensors: that got new rows.
    """

    before: int
    after: int
    padding: int
    tensors: tuple[str, ...]


def resize_vocabulary(
    model: Path,
    output: Path,
    *,
    used: int,
    wanted: int,
    multiple: int = 1,
    finish: Callable[[Path], None] = lambda folder: None,
) -> Resized:
    """Write `output`: the model with rows for all ids below `wanted`, of which those below `used` were there.

    Args:
        model: a Hugging Face folder.
        output: a new folder.
        used: the id after the largest that the tokenizer used so far.
        wanted: the id after the largest new one.
        multiple: the number of rows is one of it, where the model grows.
        finish: is given the folder before it gets its name, and adds to it.

    Raises:
        UserError: the model is quantised, or has no embedding with a row for each id.
    """
    raw = raw_config(model)
    origin = config_of(raw)
    family = causal_class(origin)
    known = bare_model(origin, family, dtype=torch.float32)
    embedding: Any = known.get_input_embeddings()
    before = int(embedding.weight.shape[0])
    used = min(used, before)
    after = max(before, wanted)
    after = -(-after // multiple) * multiple if after > before or multiple > 1 else after
    changed_raw = _resized(raw, after)
    grown = bare_model(config_of(changed_raw), family, dtype=torch.float32)
    shapes = {name: tuple(tensor.shape) for name, tensor in grown.state_dict().items()}
    rows = _with_rows(known, before, after, shapes, model)
    files = stored_tensors(model)
    places = places_of(known, (tensor.name for tensors in files for tensor in tensors))
    found: list[str] = []

    def streamed(tensor: StoredTensor) -> StreamedTensor:
        place, is_converted = places[tensor.name]
        if place not in rows:
            return passed_on(tensor)
        if is_converted or tensor.dtype not in TORCH_TYPES or tensor.shape[0] != before:
            raise UserError(f"{model}: {tensor.name} is not stored a row for each id; nothing can be added to it")
        found.append(tensor.name)
        return _grown(tensor, used, shapes[place][0])

    written = [[streamed(tensor) for tensor in tensors] for tensors in files]
    if not found:
        raise UserError(f"{model}: there is no embedding with a row for each id in its files; give the whole model")
    with written_folder(model, output, written, changed_raw if after != before else None, what="the model") as folder:
        finish(folder)
    padding = min(before, wanted) - used
    return Resized(before=before, after=after, padding=padding, tensors=tuple(found))


def _resized(raw: dict[str, Any], size: int) -> dict[str, Any]:
    """The configuration with another number of ids, wherever it says one."""
    changed = set_everywhere(raw, SIZE, size)
    if SIZE not in raw and any(isinstance(part, dict) and SIZE in part for part in raw.values()):
        changed.pop(SIZE)
    return changed


def _with_rows(model: Any, before: int, after: int, shapes: dict[str, tuple[int, ...]], folder: Path) -> set[str]:
    """The tensors with a row for each id: embedding, head, and what changes its shape with the configuration.

    Raises:
        UserError: something else changes with the number of ids.
    """
    known = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if after == before:
        parts = [part for part in (model.get_input_embeddings(), model.get_output_embeddings()) if part is not None]
        own = {id(parameter) for part in parts for parameter in part.parameters()}
        named = model.named_parameters(remove_duplicate=False)
        return {name for name, parameter in named if id(parameter) in own}
    changed = {name for name, shape in known.items() if shapes.get(name) != shape}
    for name in sorted(changed):
        if shapes.get(name) != (after, *known[name][1:]) or known[name][0] != before:
            raise UserError(
                f"{folder}: {name} of {list(known[name])} would be {list(shapes.get(name, ()))} with {after} ids; only"
                " models whose embedding and head have a row for each id can get more"
            )
    return changed


def _grown(tensor: StoredTensor, used: int, rows: int) -> StreamedTensor:
    """A tensor with `rows` rows, those from `used` on the mean of the others."""
    dtype = TORCH_TYPES[tensor.dtype]
    total: Tensor = torch.zeros(tensor.shape[1:], dtype=torch.float64)
    for start, stop in row_blocks((used, *tensor.shape[1:]), 8):
        total += tensor.rows(start, stop).double().sum(0)
    mean = (total / max(1, used)).to(dtype)

    def made(start: int, stop: int) -> Tensor:
        kept = tensor.rows(start, min(stop, used)) if start < used else mean[None][:0]
        return torch.cat([kept, mean.expand(stop - max(start, min(used, stop)), *mean.shape)])

    return computed(tensor.name, dtype, (rows, *tensor.shape[1:]), made)
