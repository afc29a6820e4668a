"""Checkpoints on disk: safetensors and JSON, written beside their name and renamed when complete.

    step-00000010/
      rank-00000.safetensors ...   pieces, each a flat tensor
      index.json                   written last: step, cursor, options, data fingerprint, where every piece is, and
                                   a checksum of everything, the index included

A piece is of one kind (the weight, the fp32 master weight, or a state of the optimizer) of one parameter, and says
which elements of the whole tensor it has (`jllm.train.checkpoint.regions`). Parameters have the whole model's names.
So nothing depends on the number of stages, data-parallel or tensor-parallel ranks: a reader asks for a region of a
parameter and gets it from whatever files hold it. There is no pickle. A folder without its index does not exist.

Format 2. In format 1 every piece was a run of the whole flattened tensor; `jllm.train.checkpoint.reader` reads both.

Cost: each process writes what it owns once.
"""

import collections
import dataclasses
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from jllm import atomic
from jllm.guards import notation
from jllm.models.weights.source import read_metadata
from jllm.models.weights.tensor_file import TensorFile, tensor_file
from jllm.train.checkpoint.folders import INDEX_NAME, publish, rank_file_name, receipt_path, temporary_folder
from jllm.train.checkpoint.regions import Region
from jllm.train.data.loader import Cursor

FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
PIECES = "pieces"
"""The name, in a file's metadata, of the table of its pieces."""
WEIGHT, MASTER = "weight", "master"
"""Kinds of pieces that every optimizer has; the others are its own state."""
RNG_PREFIX = "rng/"
CHECKSUM = "checksum"
"""The index's own, in the index."""


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
        chat_template: of the training data, for an export of the checkpoint.
        evaluation_pending: whether the evaluation that follows the step is still to be made.
        run: the run's id; "" for checkpoints from before there were ids.
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
    chat_template: str | None = None
    evaluation_pending: bool = False
    run: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """Elements of a parameter's tensor of some kind: weight, master or an optimizer state.

    Attributes:
        kind: of the tensor.
        name: of the parameter in the whole model.
        region: which elements.
        tensor: these elements, flat.
    """

    kind: str
    name: str
    region: Region
    tensor: Tensor


def tensor_key(kind: str, name: str) -> str:
    """The name of a parameter's tensor of some kind in the index."""
    return f"{kind}/{name}"


def prepare_file(pieces: Sequence[Piece], rng: dict[str, Tensor], *, copy: bool) -> TensorFile:
    """A process's file in host memory.

    Args:
        pieces: what it owns, flat and contiguous, on any device.
        rng: its random-number states, uint8.
        copy: as for `tensor_file`.
    """
    tensors: dict[str, Tensor] = {}
    table: dict[str, Any] = {}
    met: collections.Counter[str] = collections.Counter()
    for piece in pieces:
        tensor = tensor_key(piece.kind, piece.name)
        key = f"{tensor}@{met[tensor]}" if met[tensor] else tensor  # several regions of one tensor may be here
        met[tensor] += 1
        assert piece.tensor.numel() == piece.region.size, key
        tensors[key] = piece.tensor.reshape(-1)
        table[key] = {"tensor": tensor, "shape": list(piece.region.shape), **piece.region.to_json()}
    tensors |= {f"{RNG_PREFIX}{name}": value for name, value in rng.items()}
    return tensor_file(tensors, {PIECES: json.dumps(table)}, copy=copy)


def write_file(file: TensorFile, folder: Path, rank: int) -> None:
    """Write the file of process `rank` into the temporary folder of a checkpoint, and then its receipt."""
    name = rank_file_name(rank)
    checksums = file.write(temporary_folder(folder) / name)
    atomic.write_json(receipt_path(folder, rank), dataclasses.asdict(checksums))


def commit(folder: Path, state: RunState, ranks: Sequence[int]) -> None:
    """Write the index over the files of these processes, whose receipts are all there, and give the folder its name.

    `ranks` are all processes, or those of one node where each node has a checkpoint folder of its own; then several
    files may hold the same elements.
    """
    temporary = temporary_folder(folder)
    tensors: dict[str, dict[str, Any]] = {}
    files: dict[str, dict[str, Any]] = {}
    for rank in ranks:
        name = rank_file_name(rank)
        files[name] = notation.loads(receipt_path(folder, rank).read_text(encoding="utf-8"))
        for key, piece in notation.loads(read_metadata(temporary / name)[PIECES]).items():
            entry = tensors.setdefault(piece["tensor"], {"shape": piece["shape"], "parts": []})
            region = Region.from_json(piece["shape"], piece).to_json()
            if all({field: part[field] for field in region} != region for part in entry["parts"]):
                entry["parts"].append({"file": name, "key": key, **region})
    for entry in tensors.values():
        entry["parts"].sort(key=lambda part: (part["offset"], part["start"]))
    index = {
        "format": FORMAT_VERSION,
        **dataclasses.asdict(state),
        "files": files,
        "tensors": dict(sorted(tensors.items())),
    }
    write_index(temporary, index)
    for rank in ranks:
        receipt_path(folder, rank).unlink()
    publish(folder)


def write_index(folder: Path, index: dict[str, Any]) -> None:
    """Write an index with its checksum."""
    atomic.write_json(folder / INDEX_NAME, {**index, CHECKSUM: checksum_of_index(index)})


def checksum_of_index(index: dict[str, Any]) -> int:
    """CRC-32 of an index, whatever its white space and the order of its keys; its own checksum does not count."""
    content = {name: value for name, value in index.items() if name != CHECKSUM}
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
