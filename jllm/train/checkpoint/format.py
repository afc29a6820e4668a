"""Checkpoints on disk: safetensors and JSON, written beside their name and renamed when complete.

    step-00000010/
      rank-00000.safetensors ...   pieces: "<kind>/<parameter name>", flat, with [start, stop) in the file's metadata
      index.json                   written last: step, cursor, options, data fingerprint, and where every piece is

Kinds are the weight, the fp32 master weight, and each state of the optimizer. Parameters have the whole model's
names, so nothing depends on the number of stages or data-parallel ranks: a reader asks for elements [start, stop) of a
parameter and gets them from whatever files hold them. There is no pickle. A folder without its index does not exist.

Cost: each process writes what it owns once; reading maps the files.
"""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from jllm import atomic
from jllm.errors import UserError
from jllm.models.weights.source import read_metadata
from jllm.models.weights.tensor_file import TensorFile, tensor_file
from jllm.train.checkpoint.state import Piece
from jllm.train.data.loader import Cursor

INDEX_NAME = "index.json"
FORMAT_VERSION = 1
EVALUATION_NAME = "evaluation.json"
MODEL_MARKER = "config.json"
"""What makes a checkpoint of `--only_ckpt_model`, a Hugging Face folder, complete."""

_STEP_FOLDER = re.compile(r"step-(\d{8,})")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunState:
    """Where a run stands, beside its tensors.

    Attributes:
        step: optimizer steps made.
        cursor: the rows consumed.
        fingerprint: of the training data.
        optimizer_steps: updates made (skipped steps make none).
        consumed_tokens, consumed_rows: over the whole run.
        eval_loss: of the newest evaluation, None before the first.
        rebounds: evaluations in a row, up to the newest, that were worse than the one before.
        config: the resolved options.
    """

    step: int
    cursor: Cursor
    fingerprint: str
    optimizer_steps: int
    consumed_tokens: int
    consumed_rows: int
    eval_loss: float | None
    rebounds: int
    config: dict[str, Any]


def folder_of_step(root: Path, step: int) -> Path:
    """The checkpoint folder of a step."""
    return root / f"step-{step:08d}"


def step_of_folder(folder: Path) -> int:
    """The inverse of `folder_of_step`."""
    return int(folder.name.removeprefix("step-"))


def temporary_folder(folder: Path) -> Path:
    """Where a checkpoint is written before it is complete."""
    return folder.with_name(f".{folder.name}{atomic.TEMPORARY_SUFFIX}")


def part_name(rank: int) -> str:
    """The file that process `rank` writes."""
    return f"rank-{rank:05d}.safetensors"


def prepare_part(pieces: Iterable[Piece], rng: dict[str, Tensor], *, copy: bool) -> TensorFile:
    """A process's part in host memory.

    Args:
        pieces: what it owns, flat and contiguous, on any device.
        rng: its random-number states, uint8.
        copy: as for `tensor_file`.
    """
    tensors: dict[str, Tensor] = {}
    table: dict[str, Any] = {}
    for piece in pieces:
        key = f"{piece.kind}/{piece.name}"
        assert key not in tensors
        tensors[key] = piece.tensor.reshape(-1)
        table[key] = {"shape": list(piece.shape), "start": piece.start, "stop": piece.stop}
    tensors |= {f"rng/{name}": value for name, value in rng.items()}
    return tensor_file(tensors, {"pieces": json.dumps(table)}, copy=copy)


def part_path(folder: Path, rank: int) -> Path:
    """Where process `rank` writes its part of checkpoint `folder`."""
    return temporary_folder(folder) / part_name(rank)


def publish(folder: Path) -> None:
    """Give the temporary folder of a checkpoint, complete now, its name."""
    if folder.exists():
        remove_checkpoint(folder)
    os.replace(temporary_folder(folder), folder)
    atomic.sync_file(folder.parent)


def commit(folder: Path, state: RunState, ranks: Iterable[int]) -> None:
    """Write the index over the parts of these processes, which are all there, and give the folder its name.

    `ranks` are all processes, or those of one node where each node has a checkpoint folder of its own; then several
    parts may hold the same elements.
    """
    temporary = temporary_folder(folder)
    tensors: dict[str, dict[str, Any]] = {}
    for rank in ranks:
        table = json.loads(read_metadata(temporary / part_name(rank))["pieces"])
        for key, piece in table.items():
            entry = tensors.setdefault(key, {"shape": piece["shape"], "parts": []})
            place = {"start": piece["start"], "stop": piece["stop"]}
            if all({key: part[key] for key in place} != place for part in entry["parts"]):
                entry["parts"].append({"file": part_name(rank), **place})
    for entry in tensors.values():
        entry["parts"].sort(key=lambda part: part["start"])
    index = {"format": FORMAT_VERSION, **dataclasses.asdict(state), "tensors": dict(sorted(tensors.items()))}
    atomic.write_json(temporary / INDEX_NAME, index)
    publish(folder)


def list_checkpoints(root: Path, *, marker: str = INDEX_NAME) -> list[Path]:
    """The complete checkpoints below `root`, oldest first, by step number."""
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if _STEP_FOLDER.fullmatch(path.name) and (path / marker).is_file()]
    return sorted(found, key=step_of_folder)


def remove_incomplete(root: Path) -> None:
    """Remove what was being written, or removed, when a run died."""
    for path in root.glob(f".step-*{atomic.TEMPORARY_SUFFIX}"):
        shutil.rmtree(path, ignore_errors=True)


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint; killed in between, it no longer exists either."""
    for marker in (INDEX_NAME, MODEL_MARKER):
        (folder / marker).unlink(missing_ok=True)
    gone = temporary_folder(folder).with_name(f".{folder.name}.old{atomic.TEMPORARY_SUFFIX}")
    os.replace(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)


def find_checkpoint(given: Path, tag: str | None, *, option: str) -> Path:
    """The checkpoint a user means: `given` itself, or `given/tag`, or the newest complete one in `given`.

    Raises:
        UserError: there is none.
    """
    if tag is not None:
        if (given / tag / INDEX_NAME).is_file():
            return given / tag
        known = ", ".join(path.name for path in list_checkpoints(given)[-5:]) or "none"
        raise UserError(f"--tag {tag}: no complete checkpoint of that name in {given} (there: {known})")
    if (given / INDEX_NAME).is_file():
        return given
    checkpoints = list_checkpoints(given)
    if not checkpoints:
        raise UserError(f"{option} {given}: no complete checkpoint there; give the folder that --checkpoint named")
    return checkpoints[-1]


class CheckpointReader:
    """Reads elements of parameters from a complete checkpoint, whatever files hold them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self._index = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise UserError(f"{folder / INDEX_NAME}: cannot be read ({error}); use another checkpoint") from None
        if self._index.get("format") != FORMAT_VERSION:
            given = self._index.get("format")
            raise UserError(f"{folder}: checkpoint format {given!r}; this version reads {FORMAT_VERSION}")
        self._files: dict[str, Any] = {}

    @property
    def state(self) -> RunState:
        names = [field.name for field in dataclasses.fields(RunState)]
        values = {name: self._index[name] for name in names}
        values["cursor"] = Cursor(**values["cursor"])
        return RunState(**values)

    def shape(self, kind: str, name: str) -> tuple[int, ...] | None:
        """The whole parameter's shape, or None where the checkpoint has no such tensor."""
        entry = self._index["tensors"].get(f"{kind}/{name}")
        return None if entry is None else tuple(entry["shape"])

    def names(self, kind: str) -> set[str]:
        """The parameters of which the checkpoint has this kind."""
        return {key.removeprefix(f"{kind}/") for key in self._index["tensors"] if key.startswith(f"{kind}/")}

    def read(self, kind: str, name: str, start: int, stop: int) -> Tensor | None:
        """Elements [start, stop) of the flattened tensor; None where the checkpoint has none of that kind."""
        key = f"{kind}/{name}"
        entry = self._index["tensors"].get(key)
        if entry is None:
            return None
        found = []
        position = start  # parts are in order and may overlap
        for part in entry["parts"]:
            last = min(stop, part["stop"])
            if part["start"] <= position < last:
                content = self._open(part["file"]).get_slice(key)
                found.append(content[position - part["start"] : last - part["start"]])
                position = last
        whole = found[0] if len(found) == 1 else torch.cat(found) if found else torch.empty(0)
        if whole.numel() != stop - start:
            raise UserError(
                f"{self.folder}: {key} has {whole.numel()} of the {stop - start} elements that are needed; where each"
                " node wrote its own, go on with the same layout, or put the nodes' folders together"
            )
        return whole

    def rng(self, rank: int) -> dict[str, Tensor]:
        """The random-number states of process `rank`; empty where that process did not exist."""
        if not (self.folder / part_name(rank)).is_file():
            return {}
        file = self._open(part_name(rank))
        names = [key for key in file.keys() if key.startswith("rng/")]  # noqa: SIM118 (not a dict)
        return {name.removeprefix("rng/"): file.get_tensor(name) for name in names}

    def _open(self, name: str) -> Any:
        if name not in self._files:
            try:
                self._files[name] = safe_open(self.folder / name, framework="pt")
            except Exception as error:  # safetensors raises its own kinds
                raise UserError(f"{self.folder / name}: cannot be read ({error}); use another checkpoint") from None
        return self._files[name]
