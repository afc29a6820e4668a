"""The contract on disk: Parquet files of token-id rows.

A shard has the column `input_ids: list<int32>` and optionally `labels` (unshifted, -100 where not trained on) and
`cu_seqlens` (document boundaries in row coordinates: starts with 0, ends with the number of real tokens; padding lies
beyond). Columns and elements are non-null and signed, so that Spark reads them.

Guarantees: the bytes of a file are a function of its rows, columns and codec alone, not of how the rows were grouped in
calls to `ShardWriter.write`; a file is there completely or not at all; every page carries a checksum that reading
verifies. Row groups hold about `ROW_GROUP_TOKENS` tokens, so readers stream with a few MiB in memory.

Cost: writing about 80 M tokens/s and reading 270 M tokens/s on one core (zstd level 1, no dictionary).
"""

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import jllm
from jllm import atomic
from jllm.data.dataset import foreign
from jllm.data.dataset.columns import COLUMNS as COLUMNS
from jllm.data.dataset.columns import CU_SEQLENS as CU_SEQLENS
from jllm.data.dataset.columns import IGNORE_INDEX as IGNORE_INDEX
from jllm.data.dataset.columns import INPUT_IDS as INPUT_IDS
from jllm.data.dataset.columns import LABELS as LABELS
from jllm.data.dataset.columns import LIST_TYPE as LIST_TYPE
from jllm.data.dataset.columns import Int32 as Int32
from jllm.data.dataset.columns import Int64 as Int64
from jllm.data.dataset.columns import from_list_array as from_list_array
from jllm.data.dataset.columns import schema as schema
from jllm.data.dataset.columns import to_list_array as to_list_array
from jllm.data.dataset.list_codec import DamagedError, ListFileWriter, read_list
from jllm.errors import UserError

ROW_GROUP_TOKENS = 1 << 20
STREAM_BUFFER = 1 << 20
CONTRACT_KEY, CONTRACT_VERSION = "jllm.format", "1"
"""Written into the footer of our own shards, whose rows need no second look."""
CREATED_BY = "jllm version "
"""What the footer of a file begins its writer's name with when `ListFileWriter` wrote it."""
SPARK_SCHEMA_KEY = b"org.apache.spark.sql.parquet.row.metadata"
"""Where Spark keeps its schema, which carries our mark when our own jobs wrote the file."""
CODECS = ("zstd", "gzip", "snappy", "lz4", "brotli")


def file_name(split: str, index: int, codec: str) -> str:
    """`<split>-00000.zstd.parquet`: the name of a split's file `index`."""
    return f"{split}-{index:05d}.{codec}.parquet"


def list_shards(folder: Path) -> list[Path]:
    """All Parquet files below `folder`, sorted by path; names starting with `_` or `.` are skipped at every level.

    Raises:
        UserError: a writer is, or was when it died, still at work there (Spark's `_temporary`).
    """
    found: list[Path] = []
    for parent, folders, files in os.walk(folder):
        if "_temporary" in folders:
            raise UserError(
                f"{parent} holds _temporary: its writer has not finished or died; run it again, or remove _temporary"
            )
        if "_delta_log" in folders:
            raise UserError(
                f"{parent} is a Delta table, whose folder also holds rows that were deleted; write the table out as"
                " plain Parquet first"
            )
        folders[:] = [name for name in folders if not name.startswith(("_", "."))]
        found.extend(Path(parent, name) for name in files if name.endswith(".parquet") and name[0] not in "_.")
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


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
    """

    rows: int
    tokens: int
    trained_tokens: int
    longest_row: int
    bytes: int
    sha256: str


def real_lengths(batch: pa.RecordBatch) -> Int64:
    """The number of real tokens of each row: the last of `cu_seqlens`, or the row's length."""
    if CU_SEQLENS in batch.schema.names:
        values, offsets = from_list_array(batch.column(CU_SEQLENS))
        return values[offsets[1:] - 1].astype(np.int64)
    _, offsets = from_list_array(batch.column(INPUT_IDS))
    return np.diff(offsets)


def count_trained(batch: pa.RecordBatch) -> int:
    """The number of predicted tokens: real, label not -100, and neither the row's nor a document's first token."""
    ids, offsets = from_list_array(batch.column(INPUT_IDS))
    trained = np.ones(len(ids), dtype=bool)
    if LABELS in batch.schema.names:
        labels, _ = from_list_array(batch.column(LABELS))
        trained &= labels != IGNORE_INDEX
    starts, ends = offsets[:-1], offsets[1:]
    trained[starts[ends > starts]] = False
    if CU_SEQLENS in batch.schema.names:
        boundaries, cu_offsets = from_list_array(batch.column(CU_SEQLENS))
        row_of = np.repeat(np.arange(len(starts)), np.diff(cu_offsets))
        position = boundaries + starts[row_of]
        trained[position[boundaries < (ends - starts)[row_of]]] = False
        real_ends = starts + boundaries[cu_offsets[1:] - 1]
        for start, end in zip(real_ends[real_ends < ends], ends[real_ends < ends], strict=True):
            trained[start:end] = False
    return int(np.count_nonzero(trained))


def conform(batch: pa.RecordBatch, columns: Sequence[str]) -> pa.RecordBatch:
    """The batch with exactly these columns: an absent `labels` trains on everything, an absent `cu_seqlens` is one
    document without padding."""
    if batch.schema.names == list(columns):
        return batch
    ids, offsets = from_list_array(batch.column(INPUT_IDS))
    arrays = []
    for name in columns:
        if name in batch.schema.names:
            arrays.append(batch.column(name))
        elif name == LABELS:
            arrays.append(to_list_array(ids, offsets))
        else:
            boundaries = np.zeros((batch.num_rows, 2), np.int32)
            boundaries[:, 1] = np.diff(offsets)
            arrays.append(to_list_array(boundaries.ravel(), np.arange(0, 2 * batch.num_rows + 1, 2)))
    return pa.RecordBatch.from_arrays(arrays, schema=schema(columns))


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
        columns: names out of `COLUMNS`; every batch has exactly these.
        codec: one of `CODECS`.
        pool: compresses the pages of a row group at the same time.
    """

    def __init__(
        self, path: Path, *, columns: Sequence[str], codec: str = "zstd", pool: Executor | None = None
    ) -> None:
        self.path = path
        self._pool = pool
        self.schema = schema(columns)
        self.codec = codec
        self.statistics: ShardStatistics
        self._pending: list[pa.RecordBatch] = []
        self._pending_tokens = 0
        self._rows = self._tokens = self._trained = self._longest = 0

    def __enter__(self) -> "ShardWriter":
        self._replacing = atomic.replacing(self.path)
        temporary = self._replacing.__enter__()
        self._file = _HashingFile(temporary.open("wb"))
        self._writer = ListFileWriter(
            self._file,
            self.schema,
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
            room = ROW_GROUP_TOKENS - self._pending_tokens
            # The row that reaches the budget closes the group, so the cuts depend on the rows alone.
            taken = min(int(np.searchsorted(offsets, room)), batch.num_rows)
            head = batch.slice(0, taken)
            self._pending.append(head)
            self._pending_tokens += int(offsets[taken])
            if self._pending_tokens >= ROW_GROUP_TOKENS:
                self._flush()
            batch = batch.slice(taken)

    def _flush(self) -> None:
        if not self._pending:
            return
        group = pa.Table.from_batches(self._pending, self.schema).combine_chunks().to_batches()[0]
        lengths = np.diff(from_list_array(group.column(INPUT_IDS))[1])
        self._rows += group.num_rows
        self._tokens += int(real_lengths(group).sum())
        self._trained += count_trained(group)
        self._longest = max(self._longest, int(lengths.max(initial=0)))
        self._writer.write(group)
        self._pending, self._pending_tokens = [], 0

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
                tokens=self._tokens,
                trained_tokens=self._trained,
                longest_row=self._longest,
                bytes=size,
                sha256=self._file.hexdigest(),
            )
        else:
            self._file.close()
        self._replacing.__exit__(kind, error, trace)


class ShardReader:
    """One shard, read by row group in the contract's schema, whoever wrote it.

    Lists of other kinds and integers of other sizes are brought to the contract's type, and document boundaries to its
    coordinates (see `jllm.data.dataset.foreign`); columns that the contract does not know are not read.

    Raises:
        UserError: not a Parquet file, no `input_ids` lists, nulls, ids beyond int32, document boundaries that make no
            sense, or a page whose checksum is wrong; the message names the file.
    """

    def __init__(self, path: Path, *, streaming: bool = False) -> None:
        self.path = path
        try:
            self._source = pa.OSFile(str(path))
            self._file = pq.ParquetFile(
                self._source,
                page_checksum_verification=True,
                pre_buffer=False,
                buffer_size=STREAM_BUFFER if streaming else 0,
            )
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path}: cannot be read as Parquet: {error}") from None
        names = self._file.schema_arrow.names
        if INPUT_IDS not in names:
            found = ", ".join(names[:8])
            raise UserError(f"{path}: not a token-id shard: no column {INPUT_IDS} (columns: {found})")
        self.columns = tuple(name for name in COLUMNS if name in names)
        for name in self.columns:
            foreign.check_type(self._file.schema_arrow.field(name), path)
        metadata = self._file.metadata.metadata or {}
        self._ours = CONTRACT_KEY.encode() in metadata or CONTRACT_KEY.encode() in metadata.get(SPARK_SCHEMA_KEY, b"")
        self._own_layout = self._ours and self._file.metadata.created_by.startswith(CREATED_BY)

    @property
    def metadata(self) -> pq.FileMetaData:
        return self._file.metadata

    @property
    def rows_of_groups(self) -> list[int]:
        """The number of rows of each row group."""
        return [self.metadata.row_group(index).num_rows for index in range(self.metadata.num_row_groups)]

    def elements(self, name: str) -> tuple[int, tuple[int, int] | None]:
        """From the footer: how many elements the lists of a column have (1 for an empty list), and their range.

        The range is None where the writer recorded none.
        """
        total, low, high, known = 0, 0, 0, True
        for group in range(self.metadata.num_row_groups):
            chunks = self.metadata.row_group(group)
            for index in range(chunks.num_columns):
                chunk = chunks.column(index)
                if chunk.path_in_schema.split(".")[0] != name or not chunk.num_values:
                    continue
                total += chunk.num_values
                statistics = chunk.statistics
                if statistics is None or not statistics.has_min_max:
                    known = False
                else:
                    low, high = min(low, statistics.min), max(high, statistics.max)
        return total, (low, high) if known else None

    def read_group(self, index: int, columns: Sequence[str] | None = None) -> pa.RecordBatch:
        """Row group `index` as one batch in the contract's schema."""
        wanted = [name for name in self.columns if columns is None or name in columns]
        if self._own_layout:
            return self._read_own_group(index, wanted)
        needed = wanted if self._ours or CU_SEQLENS not in wanted else [*{*wanted, INPUT_IDS}]
        with self._damage_named(index):
            table = self._file.read_row_group(index, columns=needed, use_threads=False)
        return self._in_contract({name: table.column(name) for name in needed}, index, wanted)

    def _read_own_group(self, index: int, wanted: Sequence[str]) -> pa.RecordBatch:
        facts = self.metadata.row_group(index)
        chunks = {facts.column(i).path_in_schema.split(".")[0]: facts.column(i) for i in range(facts.num_columns)}
        with self._damage_named(index):
            arrays = [read_list(self._source, chunks[name]) for name in wanted]
            return pa.RecordBatch.from_arrays(arrays, schema=schema(wanted))

    def rows_at_once(self, group: int) -> int:
        """How many rows each batch of `batches(group)` has, but the last: all, or about `ROW_GROUP_TOKENS` tokens."""
        facts = self.metadata.row_group(group)
        tokens = sum(
            facts.column(index).num_values
            for index in range(facts.num_columns)
            if facts.column(index).path_in_schema.split(".")[0] == INPUT_IDS
        )
        if tokens <= 2 * ROW_GROUP_TOKENS:
            return max(1, int(facts.num_rows))
        return max(1, int(facts.num_rows * ROW_GROUP_TOKENS // tokens))

    def batches(self, group: int) -> Iterator[pa.RecordBatch]:
        """Row group `group` in batches of `rows_at_once(group)` rows, also where its writer made it very large."""
        rows = self.rows_at_once(group)
        if rows >= self.metadata.row_group(group).num_rows:
            yield self.read_group(group)
            return
        reader = ShardReader(self.path, streaming=True)
        pieces = reader._file.iter_batches(rows, row_groups=[group], columns=list(self.columns), use_threads=False)
        while True:
            with self._damage_named(group):
                batch = next(pieces, None)
            if batch is None:
                return
            columns = {name: batch.column(name) for name in self.columns}
            yield self._in_contract(columns, group, self.columns)

    @contextlib.contextmanager
    def _damage_named(self, group: int) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, DamagedError, OSError) as error:
            raise UserError(f"{self.path}: row group {group} is damaged: {error}") from None

    def _in_contract(
        self, columns: dict[str, pa.Array | pa.ChunkedArray], group: int, wanted: Sequence[str]
    ) -> pa.RecordBatch:
        where = f"{self.path}: row group {group}"
        arrays = {name: foreign.list_column(column, f"{where}: column {name}") for name, column in columns.items()}
        if CU_SEQLENS in wanted and not self._ours:
            arrays[CU_SEQLENS] = foreign.boundaries(arrays[CU_SEQLENS], arrays[INPUT_IDS], where)
        return pa.RecordBatch.from_arrays([arrays[name] for name in wanted], schema=schema(wanted))

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        """All rows in order, about `ROW_GROUP_TOKENS` tokens in memory at a time."""
        for index in range(self.metadata.num_row_groups):
            yield from self.batches(index)

    def close(self) -> None:
        self._file.close()
        self._source.close()
