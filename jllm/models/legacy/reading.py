"""Reading and writing older checkpoints, one stage's tensors at a time.

Packed tensors are split as they are read, so a stage holds its own weights and one published tensor more. Files are
mapped, safetensors or pickled alike (`weights_only`: nothing in a pickle is run).
"""

from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PretrainedConfig

from jllm.errors import UserError
from jllm.guards import notation
from jllm.guards.tensors import read_header
from jllm.models.legacy.layouts import PublishedLayout
from jllm.models.weight_index import files_in_index


def read_tensors(
    folder: Path,
    layout: PublishedLayout,
    raw: dict[str, Any],
    config: PretrainedConfig,
    wanted: set[str],
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """The tensors among `wanted` (our names) in `dtype`, in memory of their own.

    Raises:
        UserError: there are no weights, or a file of them is broken, or one that the index names is not there.
    """
    found: dict[str, Tensor] = {}
    for file, names in _files(folder):
        for name in names:
            targets = {target: make for target, make in layout.targets(name, config, raw).items() if target in wanted}
            if targets:
                tensor = file.get_tensor(name)
                for target, make in targets.items():
                    found[target] = make(tensor).to(dtype, copy=True).contiguous()
    return found


class _Pickled:
    """A pickled file that looks like a safetensors file."""

    def __init__(self, path: Path) -> None:
        try:
            self.tensors: dict[str, Tensor] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except (RuntimeError, UnpicklingError, EOFError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{path} cannot be read as a file of weights ({reason}); download it again") from None

    def get_tensor(self, name: str) -> Tensor:
        return self.tensors[name]


def _check_complete(folder: Path) -> None:
    """That every pickled file is there which the index, if there is one, names."""
    index = folder / "pytorch_model.bin.index.json"
    if index.is_file():
        files_in_index(index)


def _files(folder: Path) -> Iterator[tuple[Any, list[str]]]:
    safe = sorted(folder.glob("*.safetensors"))
    for path in safe:
        read_header(path)
        with safe_open(path, framework="pt") as file:
            yield file, list(file.keys())
    if safe:
        return
    _check_complete(folder)
    pickled = sorted(folder.glob("pytorch_model*.bin"))
    if not pickled:
        raise UserError(f"model folder {str(folder)!r} has no weights; download them")
    for path in pickled:
        opened = _Pickled(path)
        yield opened, list(opened.tensors)


def read_raw_config(folder: Path) -> dict[str, Any]:
    """config.json as it is; empty where there is none."""
    path = folder / "config.json"
    try:
        raw = notation.read_json(path)
    except (OSError, ValueError):
        return {}
    return raw if isinstance(raw, dict) else {}


def to_published(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Baichuan 13B's own layout again: what plain transformers has no class for is exported as it came."""
    published: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(".q_proj.weight"):
            prefix = name.removesuffix("q_proj.weight")
            parts = [tensors[f"{prefix}{part}_proj.weight"] for part in "qkv"]
            published[f"{prefix}W_pack.weight"] = torch.cat(parts)
        elif not name.endswith((".k_proj.weight", ".v_proj.weight")):
            published[name] = tensor
    return published
