"""Checkpoints: safetensors and JSON, written beside their name and renamed when complete.

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
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from jllm import atomic
from jllm.errors import UserError
from jllm.train.state import Piece
from jllm.train.stream import Cursor

INDEX_NAME = "index.json"
FORMAT_VERSION = 1
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
        config: the resolved options.
    """

    step: int
    cursor: Cursor
    fingerprint: str
    optimizer_steps: int
    consumed_tokens: int
    consumed_rows: int
    config: dict[str, Any]


def folder_of_step(root: Path, step: int) -> Path:
    """The checkpoint folder of a step."""
    return root / f"step-{step:08d}"


def temporary_folder(folder: Path) -> Path:
    """Where a checkpoint is written before it is complete."""
    return folder.with_name(f".{folder.name}{atomic.TEMPORARY_SUFFIX}")


def part_name(rank: int) -> str:
    """The file that process `rank` writes."""
    return f"rank-{rank:05d}.safetensors"


def write_part(folder: Path, rank: int, pieces: list[Piece], rng: dict[str, Tensor]) -> None:
    """Write one process's share into the temporary folder of checkpoint `folder`."""
    temporary = temporary_folder(folder)
    temporary.mkdir(parents=True, exist_ok=True)
    tensors = {f"{piece.kind}/{piece.name}": piece.tensor.contiguous() for piece in pieces}
    assert len(tensors) == len(pieces)
    table = {
        f"{piece.kind}/{piece.name}": {"shape": list(piece.shape), "start": piece.start, "stop": piece.stop}
        for piece in pieces
    }
    tensors.update({f"rng/{name}": value for name, value in rng.items()})
    path = temporary / part_name(rank)
    save_file(tensors, path, metadata={"pieces": json.dumps(table)})
    atomic.sync_file(path)


def commit(folder: Path, state: RunState, world_size: int) -> None:
    """Write the index over all processes' parts and give the folder its name; after every `write_part`."""
    temporary = temporary_folder(folder)
    tensors: dict[str, dict[str, Any]] = {}
    for rank in range(world_size):
        with safe_open(temporary / part_name(rank), framework="pt") as file:
            table = json.loads(file.metadata()["pieces"])
        for key, piece in table.items():
            entry = tensors.setdefault(key, {"shape": piece["shape"], "parts": []})
            entry["parts"].append({"file": part_name(rank), "start": piece["start"], "stop": piece["stop"]})
    for entry in tensors.values():
        entry["parts"].sort(key=lambda part: part["start"])
    index = {"format": FORMAT_VERSION, **dataclasses.asdict(state), "tensors": dict(sorted(tensors.items()))}
    atomic.write_json(temporary / INDEX_NAME, index)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(temporary, folder)
    atomic.sync_file(folder.parent)


def list_checkpoints(root: Path) -> list[Path]:
    """The complete checkpoints below `root`, oldest first, by step number."""
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if _STEP_FOLDER.fullmatch(path.name) and (path / INDEX_NAME).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def remove_incomplete(root: Path) -> None:
    """Remove what was being written when a run died."""
    for path in root.glob(f".step-*{atomic.TEMPORARY_SUFFIX}"):
        shutil.rmtree(path, ignore_errors=True)


def keep_newest(root: Path, count: int) -> None:
    """Remove all but the newest `count` checkpoints; 0 keeps all."""
    if count:
        for path in list_checkpoints(root)[:-count]:
            # The index goes first: a half-removed checkpoint does not exist.
            (path / INDEX_NAME).unlink()
            shutil.rmtree(path)


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

    def read(self, kind: str, name: str, start: int, stop: int) -> Tensor | None:
        """Elements [start, stop) of the flattened tensor; None where the checkpoint has none of that kind."""
        key = f"{kind}/{name}"
        entry = self._index["tensors"].get(key)
        if entry is None:
            return None
        found = []
        for part in entry["parts"]:
            first, last = max(start, part["start"]), min(stop, part["stop"])
            if first < last:
                content = self._open(part["file"]).get_slice(key)
                found.append(content[first - part["start"] : last - part["start"]])
        whole = found[0] if len(found) == 1 else torch.cat(found) if found else torch.empty(0)
        if whole.numel() != stop - start:
            raise UserError(f"{self.folder}: {key} has {whole.numel()} of the {stop - start} elements that are needed")
        return whole

    def rng(self, rank: int) -> dict[str, Tensor]:
        """The random-number states of process `rank`; empty where that process did not exist."""
        if not (self.folder / part_name(rank)).is_file():
            return {}
        file = self._open(part_name(rank))
        return {key.removeprefix("rng/"): file.get_tensor(key) for key in file.keys() if key.startswith("rng/")}  # noqa: SIM118

    def _open(self, name: str) -> Any:
        if name not in self._files:
            try:
                self._files[name] = safe_open(self.folder / name, framework="pt")
            except Exception as error:  # safetensors raises its own kinds
                raise UserError(f"{self.folder / name}: cannot be read ({error}); use another checkpoint") from None
        return self._files[name]
