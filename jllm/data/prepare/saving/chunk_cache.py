"""Encoded chunks on disk, from when they are encoded until no sink may need them again: what a killed run need not
encode anew.

A file is a head in JSON and arrays as they lie in memory: ids, offsets, labels as bits, control classes, and where
pairs are cut. Rows are made of it (`Block` says where its tokens lie); as a whole it is mapped, not read.

Guarantees: a file is there whole or not at all; one that is torn, because it is not flushed to disk, is not taken.
Cost: writing and a sum over the arrays; 2 or 4 bytes a token on disk.
"""

import dataclasses
import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jllm import atomic
from jllm.data.dataset.columns import IGNORE_INDEX
from jllm.data.packing.documents import Documents
from jllm.data.packing.pieces import Block
from jllm.data.prepare.encoding import Encoded
from jllm.data.sources.records import BadRecord
from jllm.guards import notation

Place = tuple[int, int]
"""A chunk: number of its source, and its number there."""
_MAGIC = b"jllmblk2"


class ChunkCache:
    """See the module. Chunks are loaded and saved from several threads.

    Args:
        folder: where the files lie.
        vocab_size: number of ids, which decides how wide saved ids are.
        sinks: who has to say of a chunk that it is needed no more.
    """

    def __init__(self, folder: Path, *, vocab_size: int, sinks: Sequence[str]) -> None:
        self.folder = folder
        self.vocab_size = vocab_size
        self._needed: dict[str, Place] = dict.fromkeys(sinks, (0, 0))
        self._known = {path.name for path in folder.glob("block-*")}

    def path(self, place: Place) -> Path:
        """Where a chunk is saved; the names are in the order of the places."""
        return self.folder / f"block-{place[0]:05d}-{place[1]:07d}"

    def load(self, place: Place) -> tuple[Encoded, Block] | None:
        """A chunk that an earlier run saved, once; None where it saved none, or it is torn."""
        path = self.path(place)
        if path.name not in self._known:
            return None
        self._known.discard(path.name)
        return read(path)

    def save(self, place: Place, encoded: Encoded) -> Block:
        """Save a chunk, whose lines count from 1; where its tokens lie."""
        return write(self.path(place), encoded, self.vocab_size)

    def needed_from(self, sink: str, place: Place) -> None:
        """A sink says that it needs no chunk before this one any more; what no sink needs is removed."""
        self._needed[sink] = place
        limit = self.path(min(self._needed.values())).name
        for path in self.folder.glob("block-*"):
            if path.name < limit:
                path.unlink(missing_ok=True)


def write(path: Path, encoded: Encoded, vocab_size: int) -> Block:
    """Write a chunk beside its name and rename it; not flushed to disk: the checksum finds what was torn."""
    narrow = np.uint16 if vocab_size <= 1 << 16 else np.int32
    documents = encoded.documents
    arrays: list[NDArray[Any]] = [documents.ids.astype(narrow, copy=False), documents.offsets]
    if documents.labels is not None:
        arrays.append(np.packbits(documents.labels != IGNORE_INDEX))
    if documents.classes is not None:
        arrays.append(documents.classes)
    if documents.cuts is not None:
        arrays.append(documents.cuts)
    head = {
        "labels": documents.labels is not None,
        **({"cuts": True} if documents.cuts is not None else {}),
        "bad": [dataclasses.astuple(record) for record in encoded.bad],
        "counts": encoded.counts,
        "end": encoded.end,
        "end_line": encoded.end_line,
        "arrays": [[array.dtype.str, len(array)] for array in arrays],
        "sums": [_checksum(array) for array in arrays],
    }
    text = json.dumps(head).encode()
    text += b" " * (-(len(text) + 16) % 8)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_native_id()}.tmp")
    atomic.create(temporary)
    with atomic.naming(path), temporary.open("wb") as file:
        file.write(_MAGIC + len(text).to_bytes(8, "little") + text)
        for array in arrays:
            file.write(_bytes(array))
            file.write(b"\0" * (-array.nbytes % 8))
    os.replace(temporary, path)
    return _block(path, 16 + len(text), [(array.dtype, len(array)) for array in arrays], documents.labels is not None)


def read(path: Path) -> tuple[Encoded, Block] | None:
    """A written chunk, its ids mapped from the file; None where the file is absent or torn."""
    try:
        whole = np.memmap(path, dtype=np.uint8, mode="r")
    except (OSError, ValueError):
        return None
    if whole[:8].tobytes() != _MAGIC:
        return None
    size = int.from_bytes(whole[8:16].tobytes(), "little")
    try:
        head: dict[str, Any] = notation.loads(whole[16 : 16 + size].tobytes())
    except ValueError:
        return None
    arrays, at = [], 16 + size
    for (kind, length), known in zip(head["arrays"], head["sums"], strict=True):
        nbytes = np.dtype(kind).itemsize * length
        stretch = whole[at : at + nbytes]
        if len(stretch) != nbytes or _checksum(stretch) != known:
            return None
        arrays.append(stretch.view(kind))
        at += nbytes + -nbytes % 8
    ids = arrays[0].astype(np.int32, copy=False)
    labels = None
    has_labels = bool(head["labels"])
    cuts = np.array(arrays.pop()) if head.get("cuts") else None
    classes = arrays[2 + has_labels] if len(arrays) > 2 + has_labels else None
    if has_labels:
        trained = np.unpackbits(arrays[2], count=len(ids)).astype(bool)
        labels = np.where(trained, ids, np.int32(IGNORE_INDEX))
    encoded = Encoded(
        documents=Documents(ids=ids, offsets=np.array(arrays[1]), labels=labels, classes=classes, cuts=cuts),
        bad=[BadRecord(kind=kind, line=line, detail=detail) for kind, line, detail in head["bad"]],
        counts=head["counts"],
        end=head["end"],
        end_line=head["end_line"],
    )
    sizes = [(np.dtype(kind), length) for kind, length in head["arrays"]]
    return encoded, _block(path, 16 + size, sizes, has_labels)


def _block(path: Path, ids: int, arrays: Sequence[tuple[np.dtype[Any], int]], has_labels: bool) -> Block:
    """Where tokens lie in a file whose arrays, of these types and lengths, begin at byte `ids`."""
    labels = ids
    for kind, length in arrays[:2]:
        labels += -(-kind.itemsize * length // 8) * 8
    return Block(str(path), ids, arrays[0][0].itemsize, labels if has_labels else None)


def _bytes(array: NDArray[Any]) -> Any:
    """The array's memory as a buffer, without a copy."""
    return np.ascontiguousarray(array).data.cast("B") if array.size else b""


def _checksum(array: NDArray[Any]) -> int:
    """Finds pages that never reached the disk, at the speed of memory: a sum of the array's words."""
    data = np.ascontiguousarray(array).view(np.uint8)
    words = len(data) // 8 * 8
    return (int(data[:words].view(np.uint64).sum(dtype=np.uint64)) + int(data[words:].sum())) & (2**63 - 1)
