"""Shards, Parquet files of token-id rows: written here, and the names that go with them.

A shard has the column `input_ids: list<int32>` and optionally `labels` (unshifted, -100 where not trained on) and
`cu_seqlens` (document boundaries in row coordinates: starts with 0, ends with the number of real tokens; padding lies
beyond), and any further columns of int32, float32 or text, one a row or in lists. Columns and elements are non-null and
signed, so that Spark reads them.

Guarantees: the bytes of a file are a function of its rows, columns and codec alone, not of how the rows were grouped in
calls to `ShardWriter.write`; a file is there completely or not at all; every page carries a checksum that reading
verifies. Row groups hold about `ROW_GROUP_TOKENS` tokens, fewer where further columns have more than
`ROW_GROUP_FURTHER_BYTES`, so readers stream with a few MiB in memory.

Cost: writing about 80 M tokens/s on one core (zstd level 1, no dictionary).
"""

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa

import jllm
from jllm import atomic
from jllm.data.dataset import files
from jllm.data.dataset.columns import COLUMNS as COLUMNS
from jllm.data.dataset.columns import CU_SEQLENS as CU_SEQLENS
from jllm.data.dataset.columns import IGNORE_INDEX as IGNORE_INDEX
from jllm.data.dataset.columns import INPUT_IDS as INPUT_IDS
from jllm.data.dataset.columns import LABELS as LABELS
from jllm.data.dataset.columns import LIST_TYPE as LIST_TYPE
from jllm.data.dataset.columns import Column as Column
from jllm.data.dataset.columns import Int32 as Int32
from jllm.data.dataset.columns import Int64 as Int64
from jllm.data.dataset.columns import bytes_before, ordered
from jllm.data.dataset.columns import conform as conform
from jllm.data.dataset.columns import from_list_array as from_list_array
from jllm.data.dataset.columns import schema as schema
from jllm.data.dataset.columns import to_list_array as to_list_array
from jllm.data.dataset.file_writer import ColumnFileWriter, MadeGroup, make_group
from jllm.data.dataset.files import CODECS as CODECS
from jllm.data.dataset.files import CONTRACT_KEY as CONTRACT_KEY
from jllm.data.dataset.files import CONTRACT_VERSION as CONTRACT_VERSION
from jllm.data.dataset.files import CREATED_BY
from jllm.data.dataset.files import ROW_GROUP_TOKENS as ROW_GROUP_TOKENS
from jllm.data.dataset.files import file_name as file_name
from jllm.data.dataset.files import list_shards as list_shards
from jllm.data.dataset.reader import ShardReader as ShardReader
from jllm.data.dataset.token_counts import count_trained as count_trained
from jllm.data.dataset.token_counts import real_lengths as real_lengths

ROW_GROUP_FURTHER_BYTES = 4 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardStatistics:
    """What one file holds.

    Attributes:
        rows: number of rows.
        tokens: real tokens of all rows, padding not counted; a token that two rows share counts twice.
        trained_tokens: tokens that are predicted (see `count_trained`).
        longest_row: length of the longest row, padding included.
        bytes: size of the file.
        sha256: of the file's bytes, in hex.
        largest_id: 0 where there is no id.
    """

    rows: int
    tokens: int
    trained_tokens: int
    longest_row: int
    bytes: int
    sha256: str
    largest_id: int


class GroupFacts(NamedTuple):
    """Of a row group what `ShardStatistics` says of a file."""

    tokens: int
    trained: int
    longest: int
    largest_id: int

    @classmethod
    def of(cls, group: pa.RecordBatch) -> "GroupFacts":
        ids, offsets = from_list_array(group.column(INPUT_IDS))
        return cls(
            tokens=int(real_lengths(group).sum()),
            trained=count_trained(group),
            longest=int(np.diff(offsets).max(initial=0)),
            largest_id=int(ids.max(initial=0)),
        )


def rows_of_group(offsets: Int64, further: Int64 | None, tokens: int, further_bytes: int) -> int:
    """How many rows go to a row group that holds `tokens` tokens and `further_bytes` already: the row that reaches a
    budget closes the group, so the cuts depend on the rows alone.

    Args:
        offsets: [rows + 1] tokens in the rows before each.
        further: [rows + 1] bytes in the further columns of the rows before each; None where there are no such columns.
    """
    rows = len(offsets) - 1
    taken = min(int(np.searchsorted(offsets, files.ROW_GROUP_TOKENS - tokens)), rows)
    if further is not None:
        taken = min(taken, int(np.searchsorted(further, ROW_GROUP_FURTHER_BYTES - further_bytes)))
    return taken


def is_full(tokens: int, further_bytes: int) -> bool:
    """Whether a row group that holds this much is closed."""
    return tokens >= files.ROW_GROUP_TOKENS or further_bytes >= ROW_GROUP_FURTHER_BYTES


def made_group(
    columns: Sequence[Column], batches: Sequence[pa.RecordBatch], codec: str, write: Callable[[Any], object]
) -> tuple[MadeGroup, GroupFacts]:
    """A row group of these rows, for `ShardWriter.append`; its bytes are given to `write`."""
    group = pa.Table.from_batches(batches).combine_chunks().to_batches()[0]
    return make_group(columns, group, codec, write), GroupFacts.of(group)


class _HashingFile:
    """A binary file that is hashed as it is written, so that its checksum costs no second read."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._hash = hashlib.sha256()

    def write(self, data: Any) -> int:
        self._hash.update(data)
        return self._raw.write(data)

    def tell(self) -> int:
        return self._raw.tell()

    def close(self) -> None:
        self._raw.close()

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


class ShardWriter:
    """Writes one shard; use it as a context manager. `statistics` is there after the block.

    Args:
        path: the final name; the file is written beside it and renamed when the block ends well.
        columns: names out of `COLUMNS`; every batch has exactly these,
        further: and these.
        codec: one of `CODECS`.
        pool: compresses the pages of a row group at the same time.
    """

    def __init__(
        self,
        path: Path,
        *,
        columns: Sequence[str],
        further: Sequence[Column] = (),
        codec: str = "zstd",
        pool: Executor | None = None,
    ) -> None:
        self.path = path
        self._pool = pool
        self.columns = ordered(columns, further)
        self.schema = schema(columns, further)
        self.codec = codec
        self.statistics: ShardStatistics
        self._pending: list[pa.RecordBatch] = []
        self._pending_tokens = self._pending_bytes = 0
        self._rows = 0
        self._facts: list[GroupFacts] = []

    def __enter__(self) -> "ShardWriter":
        self._replacing = atomic.replacing(self.path)
        temporary = self._replacing.__enter__()
        self._file = _HashingFile(temporary.open("wb"))
        self._writer = ColumnFileWriter(
            self._file,
            self.columns,
            codec=self.codec,
            metadata={CONTRACT_KEY: CONTRACT_VERSION},
            writer=f"{CREATED_BY}{jllm.__version__}",
            pool=self._pool,
        )
        return self

    def write(self, batch: pa.RecordBatch) -> None:
        """Append rows. Batches may have any size; row groups are cut by tokens."""
        if batch.schema != self.schema:
            batch = batch.cast(self.schema)
        while batch.num_rows:
            _, offsets = from_list_array(batch.column(INPUT_IDS))
            further = self._further_bytes(batch)
            taken = rows_of_group(offsets, further, self._pending_tokens, self._pending_bytes)
            self._pending.append(batch.slice(0, taken))
            self._pending_tokens += int(offsets[taken])
            self._pending_bytes += 0 if further is None else int(further[taken])
            if is_full(self._pending_tokens, self._pending_bytes):
                self._flush()
            batch = batch.slice(taken)

    def _further_bytes(self, batch: pa.RecordBatch) -> Int64 | None:
        """[rows + 1] bytes in the further columns of the rows before each; None where there are no such columns."""
        sizes = [bytes_before(batch.column(each.name)) for each in self.columns if each.name not in COLUMNS]
        return np.sum(sizes, axis=0) if sizes else None

    def _flush(self) -> None:
        if not self._pending:
            return
        group = pa.Table.from_batches(self._pending, self.schema).combine_chunks().to_batches()[0]
        self._facts.append(GroupFacts.of(group))
        self._rows += group.num_rows
        self._writer.write(group)
        self._pending, self._pending_tokens, self._pending_bytes = [], 0, 0

    def append(self, group: MadeGroup, facts: GroupFacts, data: Any) -> None:
        """Append a row group that `made_group` made, perhaps in another process."""
        assert not self._pending
        self._writer.append(group, data)
        self._facts.append(facts)
        self._rows += group.rows

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            try:
                self._flush()
                self._writer.close()
                size = self._file.tell()
                self._file.close()
            except BaseException as failure:
                self._replacing.__exit__(type(failure), failure, failure.__traceback__)
                raise
            self.statistics = ShardStatistics(
                rows=self._rows,
                tokens=sum(facts.tokens for facts in self._facts),
                trained_tokens=sum(facts.trained for facts in self._facts),
                longest_row=max((facts.longest for facts in self._facts), default=0),
                bytes=size,
                sha256=self._file.hexdigest(),
                largest_id=max((facts.largest_id for facts in self._facts), default=0),
            )
        else:
            with contextlib.suppress(OSError):  # what a full disk did not take is tried again here, and is given up
                self._file.close()
        self._replacing.__exit__(kind, error, trace)
