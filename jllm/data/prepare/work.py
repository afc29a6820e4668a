"""What the workers of a run do: a chunk to a block of ids on disk, and planned rows to a row group.

The process that plans never sees a token. A worker encodes a chunk, saves it, and says of it what `Counted` holds: how
long its documents are, to which data set they go, and which pieces rows may be made of. Row groups come back compressed
in a part of shared memory, or in a file where they are larger.

Guarantees: both are functions of their input alone, whichever worker does them.
Cost: of the bytes of a chunk none goes through the process that plans, where the source is a plain file.
"""

import dataclasses
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from jllm import atomic
from jllm.data.dataset.columns import Int64, ordered
from jllm.data.dataset.file_writer import MadeGroup
from jllm.data.dataset.shards import GroupFacts, made_group
from jllm.data.packing.packers import Packer
from jllm.data.packing.pieces import Block, Pieces, Plan
from jllm.data.prepare.encoding import ChunkEncoder, Encoded
from jllm.data.prepare.holdout import Holdout
from jllm.data.prepare.saving.chunk_cache import ChunkCache
from jllm.data.sources.chunk import Chunk
from jllm.data.sources.chunks import opened
from jllm.data.sources.records import LARGEST_RECORD, BadRecord, RefusedRecordError
from jllm.errors import UserError
from jllm.forks import Slots


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counted:
    """A chunk that is encoded and saved, without its tokens. Lines count from the chunk's first, which is 1.

    Attributes:
        block: where its tokens lie.
        lengths: [D] of its documents.
        held_out: [D] which of them are held out; None where none are.
        pieces: what rows are made of, of all documents.
        bad, counts, end, lines: as of `Encoded`, `lines` being how many the chunk has.
        fresh: whether this run encoded it.
    """

    block: Block
    lengths: Int64
    held_out: NDArray[np.bool_] | None
    pieces: Pieces
    bad: list[BadRecord]
    counts: dict[str, int]
    end: int
    lines: int
    fresh: bool

    def first(self, documents: int) -> "Counted":
        """The same up to so many documents."""
        held_out = None if self.held_out is None else self.held_out[:documents]
        pieces = self.pieces.of_documents(0, documents)
        return dataclasses.replace(self, lengths=self.lengths[:documents], held_out=held_out, pieces=pieces)

    def sets(self) -> list[tuple[Int64, Pieces]]:
        """For each data set the lengths and pieces of its documents."""
        if self.held_out is None:
            return [(self.lengths, self.pieces)]
        return [(self.lengths[chosen], self.pieces.take(chosen)) for chosen in (~self.held_out, self.held_out)]


class ChunkError(Exception):
    """The bytes of a chunk cannot be read, or are not what they may be; the reason is its argument."""


class SentContent(NamedTuple):
    """The content of a chunk on its way to a worker: in a part of shared memory, `is_table` as Arrow's stream."""

    slot: int
    size: int
    is_table: bool


class ChunkTask(NamedTuple):
    """A chunk to be encoded and saved; `sent` stands for its content where that lies in shared memory."""

    chunk: Chunk
    kind: str
    sent: SentContent | None


class GroupTask(NamedTuple):
    """Rows that become a row group, and the part of shared memory that it goes to."""

    plans: tuple[Plan, ...]
    slot: int


class RowGroup(NamedTuple):
    """A row group that is made: its bytes are the first `size` of the part that was named, or a file."""

    made: MadeGroup
    facts: GroupFacts
    size: int
    file: Path | None


class Work:
    """The work of one run; called with `ChunkTask` and `GroupTask`.

    Args:
        encoder: makes documents of a chunk.
        cache: where they are saved.
        holdout: which of them are held out.
        packer: makes rows of them.
        codec: compression of the shards.
        largest_record: bytes of the largest record that is read.
        sent, made: shared memory for the content of chunks, and for row groups.
    """

    def __init__(
        self,
        encoder: ChunkEncoder,
        cache: ChunkCache,
        holdout: Holdout,
        packer: Packer,
        *,
        codec: str,
        largest_record: int = LARGEST_RECORD,
        sent: Slots | None = None,
        made: Slots | None = None,
    ) -> None:
        self._encoder, self._cache, self._holdout = encoder, cache, holdout
        self._packer = packer
        self._columns = ordered(packer.columns, packer.further)
        self._codec = codec
        self._largest = largest_record
        self.sent, self.made = sent, made
        self._files = itertools.count()

    def __call__(self, task: ChunkTask | GroupTask) -> Any:
        return self.chunk(task) if isinstance(task, ChunkTask) else self.group(task)

    def chunk(self, task: ChunkTask) -> Counted:
        """Encode a chunk, and save it."""
        chunk = task.chunk
        if task.sent is not None:
            chunk = dataclasses.replace(chunk, data=self._received(task.sent))
        try:
            chunk = opened(chunk, task.kind, self._largest)
        except UserError as error:
            raise ChunkError(error) from None
        place, line = (chunk.source, chunk.index), chunk.line
        try:
            encoded = self._encoder(chunk, task.kind)
        except RefusedRecordError as error:
            raise error.behind(2 - line) from None
        del chunk, task
        bad = [dataclasses.replace(each, line=each.line - line + 1) for each in encoded.bad]
        encoded = dataclasses.replace(encoded, bad=bad, end_line=encoded.end_line - line + 1)
        return self.counted(encoded, self._cache.save(place, encoded), fresh=True)

    def _received(self, sent: SentContent) -> Any:
        assert self.sent is not None
        with self.sent.memory(sent.slot, sent.size) as view:
            data = bytes(view)
        return pa.ipc.open_stream(data).read_all() if sent.is_table else data

    def counted(self, encoded: Encoded, block: Block, *, fresh: bool) -> Counted:
        """What is to be known of a chunk that is saved."""
        documents = encoded.documents
        return Counted(
            block=block,
            lengths=documents.lengths,
            held_out=self._holdout.held_out(documents),
            pieces=self._packer.pieces(documents),
            bad=encoded.bad,
            counts=encoded.counts,
            end=encoded.end,
            lines=encoded.end_line - 1,
            fresh=fresh,
        )

    def group(self, task: GroupTask) -> RowGroup:
        """Make a row group."""
        rows = [self._packer.rows(plan, plan.documents()) for plan in task.plans]
        parts: list[Any] = []
        made, facts = made_group(self._columns, rows, self._codec, parts.append)
        size = sum(map(len, parts))
        assert self.made is not None
        if size > self.made.size:
            return RowGroup(made, facts, size, self._in_file(parts))
        with self.made.memory(task.slot, size) as view:
            at = 0
            for part in parts:
                view[at : at + len(part)] = memoryview(part).cast("B")
                at += len(part)
        return RowGroup(made, facts, size, None)

    def _in_file(self, parts: Sequence[Any]) -> Path:
        path = self._cache.folder / f".group-{os.getpid()}-{next(self._files)}.tmp"
        atomic.create(path)
        with atomic.naming(path), path.open("wb") as file:
            for part in parts:
                file.write(part)
        return path
