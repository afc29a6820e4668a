"""Blocks of records to documents of token ids: what runs on every core, and what it leaves on disk to resume from.

`PretrainEncoder` is the work for one block: parse, encode, end each document. It has no state and touches no file, so
it runs on threads here and inside Spark executors elsewhere. `save` and `load` keep one block's result in a file, so
that a killed run encodes nothing twice but the blocks that were in flight.

Cost: dominated by the engine; the rest is numpy over whole blocks.
"""

import dataclasses
import json
import os
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jllm.data.dataset.shards import IGNORE_INDEX, Int32
from jllm.data.packing.packers import Documents, Stored, with_affixes
from jllm.data.sources.blocks import Block
from jllm.data.sources.records import BadRecord, parse_block, texts_of
from jllm.data.tokenizer.engine import CheckedEngine
from jllm.data.tokenizer.facts import TokenizerFacts
from jllm.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoded:
    """The result of one block.

    Attributes:
        documents: its good records in order.
        bad: its bad records in order.
        counts: what happened to the records, by name (`records`, `checks`, ...): sums over blocks are meaningful.
        end, end_line: where the next block starts.
    """

    documents: Documents
    bad: list[BadRecord]
    counts: dict[str, int]
    end: int
    end_line: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainEncoder:
    """Text records to documents.

    Attributes:
        engine: what encodes.
        prefix, suffix: ids around every document; `suffix` ends with end-of-text.
        field: where the text is in a JSON record, with dots.
        parse_special: special tokens in the text become their ids.
        masked_ids: ids that are not trained on wherever they are.
    """

    engine: CheckedEngine
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    field: str = "text"
    parse_special: bool = False
    masked_ids: frozenset[int] = frozenset()

    def begin(self, block: Block, kind: str) -> None:
        """See `convert.Encoder`: all is done in this process."""

    def __call__(self, block: Block, kind: str, begun: Future[Any] | None = None) -> Encoded:
        records = texts_of(parse_block(block, kind), kind, self.field)
        checks = self.engine.check(records.values, parse_special=self.parse_special, block=block.index)
        documents = self.documents(records.values)
        counts = {"records": len(records.values) + len(records.bad), "checks": checks}
        return Encoded(documents=documents, bad=records.bad, counts=counts, end=block.end, end_line=block.end_line)

    def documents(self, texts: list[str]) -> Documents:
        """Texts to documents: ids with the prefix and suffix, and labels where some ids are masked."""
        ids, offsets = self.engine.encode(texts, parse_special=self.parse_special)
        ids, offsets = with_affixes(ids, offsets, _ids(self.prefix), _ids(self.suffix))
        labels = None
        if self.masked_ids:
            labels = np.where(np.isin(ids, _ids(tuple(self.masked_ids))), np.int32(IGNORE_INDEX), ids)
        return Documents(ids=ids, offsets=offsets, labels=labels)


def _ids(values: tuple[int, ...]) -> Int32:
    return np.array(values, dtype=np.int32)


def pretrain_affixes(facts: TokenizerFacts) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What goes around a document: the tokenizer's own prefix, and its end-of-text token.

    Raises:
        UserError: the tokenizer has no end-of-text token.
    """
    if facts.eos_id is None:
        raise UserError(
            f"--tokenizer {facts.name}: it has no end-of-text token to end documents with; set eos_token in its"
            " tokenizer_config.json, or give --doc_suffix"
        )
    own = facts.suffix if facts.suffix[-1:] != (facts.eos_id,) else facts.suffix[:-1]
    return facts.prefix, (*own, facts.eos_id)


def _bytes(array: NDArray[Any]) -> Any:
    """The array's memory as a buffer, without a copy."""
    return np.ascontiguousarray(array).data.cast("B") if array.size else b""


def _checksum(array: NDArray[Any]) -> int:
    """Finds pages that never reached the disk, at the speed of memory: a sum of the array's words."""
    data = np.ascontiguousarray(array).view(np.uint8)
    words = len(data) // 8 * 8
    return (int(data[:words].view(np.uint64).sum(dtype=np.uint64)) + int(data[words:].sum())) & (2**63 - 1)


_MAGIC = b"jllmblk1"


def save(path: Path, encoded: Encoded, vocab_size: int, *, wide: bool = False) -> None:
    """Write a block's result beside its name and rename it; not flushed to disk: the checksum finds what was torn.

    Args:
        wide: store ids and labels as they are, so that parts of them can be read from the file.
    """
    narrow = np.uint16 if vocab_size <= 1 << 16 and not wide else np.int32
    documents = encoded.documents
    arrays: list[NDArray[Any]] = [documents.ids.astype(narrow, copy=False), documents.offsets]
    if documents.labels is not None:
        arrays.append(documents.labels if wide else np.packbits(documents.labels != IGNORE_INDEX))
    head = {
        "bad": [dataclasses.astuple(record) for record in encoded.bad],
        "counts": encoded.counts,
        "end": encoded.end,
        "end_line": encoded.end_line,
        "arrays": [[array.dtype.str, len(array)] for array in arrays],
        "sums": [_checksum(array) for array in arrays],
    }
    text = json.dumps(head).encode()
    text += b" " * (-(len(text) + 16) % 8)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(_MAGIC + len(text).to_bytes(8, "little") + text)
        for array in arrays:
            file.write(_bytes(array))
            file.write(b"\0" * (-array.nbytes % 8))
    os.replace(temporary, path)


def load(path: Path, *, check: bool = True) -> Encoded | None:
    """A saved result, its ids mapped from the file; None where the file is absent or torn."""
    try:
        whole = np.memmap(path, dtype=np.uint8, mode="r")
    except (OSError, ValueError):
        return None
    if whole[:8].tobytes() != _MAGIC:
        return None
    size = int.from_bytes(whole[8:16].tobytes(), "little")
    try:
        head: dict[str, Any] = json.loads(whole[16 : 16 + size].tobytes())
    except ValueError:
        return None
    arrays, places, at = [], [], 16 + size
    for (kind, length), known in zip(head["arrays"], head["sums"], strict=True):
        nbytes = np.dtype(kind).itemsize * length
        part = whole[at : at + nbytes]
        if len(part) != nbytes or (check and _checksum(part) != known):
            return None
        arrays.append(part.view(kind))
        places.append(at)
        at += nbytes + -nbytes % 8
    ids = arrays[0].astype(np.int32, copy=False)
    labels = None
    offsets = np.array(arrays[1])
    stored: Stored | None = None
    if arrays[0].dtype == np.int32 and (len(arrays) == 2 or arrays[2].dtype == np.int32):
        labels_at = places[2] if len(arrays) == 3 else None
        stored = Stored(path=str(path), ids=places[0], labels=labels_at, starts=offsets[:-1])
    if len(arrays) == 3 and arrays[2].dtype == np.int32:
        labels = arrays[2]
    elif len(arrays) == 3:
        trained = np.unpackbits(arrays[2], count=len(ids)).astype(bool)
        labels = np.where(trained, ids, np.int32(IGNORE_INDEX))
    return Encoded(
        documents=Documents(ids=ids, offsets=offsets, labels=labels, stored=stored),
        bad=[BadRecord(kind=kind, line=line, detail=detail) for kind, line, detail in head["bad"]],
        counts=head["counts"],
        end=head["end"],
        end_line=head["end_line"],
    )
