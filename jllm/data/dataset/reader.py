"""Reads one shard by row group in the contract's schema, whoever wrote it.

Guarantees: what is read is what was written, or a `UserError` names the file and the reason. Memory: a row group, or
about `ROW_GROUP_TOKENS` tokens of it where it is larger.

Cost: 270 M tokens/s on one core (zstd level 1), where our own writer made the file; scalars and text are read by
pyarrow.
"""

import contextlib
import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from jllm.data.dataset import files, foreign
from jllm.data.dataset.columns import COLUMNS, CU_SEQLENS, INPUT_IDS, LABELS, Column, ordered, schema
from jllm.data.dataset.files import CONTRACT_KEY, CREATED_BY, SPARK_SCHEMA_KEY
from jllm.data.dataset.footer import check_footer
from jllm.data.dataset.further import FurtherColumns, further_of
from jllm.data.dataset.list_codec import DamagedError, read_list
from jllm.data.dataset.training_marks import ATTENTION_MASK, check_labels, refuse_other_marks
from jllm.errors import UserError
from jllm.guards.typed import MALFORMED

STREAM_BUFFER = 1 << 20
_PLAIN_ENCODINGS = {"PLAIN", "RLE", "BIT_PACKED"}


class ShardReader:
    """One shard.

    Lists of other kinds and integers of other sizes are brought to the contract's type, and document boundaries to its
    coordinates (see `jllm.data.dataset.foreign`).

    Args:
        path: the file.
        columns: names of the columns that row groups are read with where a call names none, absent ones ignored; None:
            all that shards can have.
        streaming: read a little at a time.

    Attributes:
        columns: the names of those out of `COLUMNS` that the file has.
        further: its further columns.

    Raises:
        UserError: not a Parquet file, no `input_ids` lists, nulls, numbers that do not fit, document boundaries that
            make no sense, labels that are neither the id nor -100, other columns that say what is trained on, or a page
            whose checksum is wrong; the message names the file.
    """

    def __init__(self, path: Path, *, columns: Sequence[str] | None = None, streaming: bool = False) -> None:
        self.path = path
        try:
            self._source = pa.OSFile(str(path))
            self._file = pq.ParquetFile(
                self._source,
                page_checksum_verification=True,
                pre_buffer=False,
                buffer_size=STREAM_BUFFER if streaming else 0,
            )
            self._names: list[str] = self._file.schema_arrow.names
            created_by = self._file.metadata.created_by
        except (pa.ArrowException, OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read as Parquet: {error}") from None
        if INPUT_IDS not in self._names:
            found = ", ".join(self._names[:8])
            raise UserError(f"{path}: not a token-id shard: no column {INPUT_IDS} (columns: {found})")
        self.columns = tuple(name for name in COLUMNS if name in self._names)
        for name in self.columns:
            foreign.check_type(self._file.schema_arrow.field(name), path)
        refuse_other_marks(self._file.schema_arrow, path, padded=self._is_padded())
        self.further: FurtherColumns = further_of(self._file.schema_arrow)
        self._default = columns
        self._is_checked = False
        metadata = self._file.metadata.metadata or {}
        self._ours = CONTRACT_KEY.encode() in metadata or CONTRACT_KEY.encode() in metadata.get(SPARK_SCHEMA_KEY, b"")
        self._own_layout = self._ours and created_by.startswith(CREATED_BY)

    @property
    def metadata(self) -> pq.FileMetaData:
        return self._file.metadata

    @property
    def stored_schema(self) -> pa.Schema:
        """The columns and types that the file itself has."""
        return self._file.schema_arrow

    @property
    def rows_of_groups(self) -> list[int]:
        """The number of rows of each row group."""
        return [self.metadata.row_group(index).num_rows for index in range(self.metadata.num_row_groups)]

    @functools.cached_property
    def _first_rows(self) -> list[int]:
        """The number of the first row of each row group."""
        return [0, *itertools.accumulate(self.rows_of_groups)]

    def _chunks(self, name: str) -> Iterator[pq.ColumnChunkMetaData]:
        """What the footer says of a column in each row group."""
        for group in range(self.metadata.num_row_groups):
            chunks = self.metadata.row_group(group)
            for index in range(chunks.num_columns):
                chunk = chunks.column(index)
                if chunk.path_in_schema == name or chunk.path_in_schema.startswith(f"{name}."):
                    yield chunk

    def _is_padded(self) -> bool:
        """Whether the footer leaves it open that an attention mask is 0 somewhere."""
        if ATTENTION_MASK not in self._names:
            return False
        known = [chunk.statistics for chunk in self._chunks(ATTENTION_MASK) if chunk.num_values]
        return any(each is None or not each.has_min_max or not each.min for each in known)

    def elements(self, name: str) -> tuple[int, tuple[int, int] | None]:
        """From the footer: how many elements the lists of a column have (1 for an empty list), and their range.

        The range is None where the writer recorded none.
        """
        total, low, high, known = 0, 0, 0, True
        for chunk in self._chunks(name):
            if not chunk.num_values:
                continue
            total += chunk.num_values
            statistics = chunk.statistics
            if statistics is None or not statistics.has_min_max:
                known = False
            else:
                low, high = min(low, statistics.min), max(high, statistics.max)
        return total, (low, high) if known else None

    def text_size(self, name: str) -> int:
        """At most how many bytes the texts of a column are: by the footer, or where the column is encoded in fewer
        bytes than it takes, by reading it."""
        try:
            self._check_footer()
        except ValueError as error:
            raise UserError(f"{self.path}: is damaged: {error}") from None
        chunks = list(self._chunks(name))
        if all(_PLAIN_ENCODINGS.issuperset(chunk.encodings) for chunk in chunks):
            return sum(chunk.total_uncompressed_size for chunk in chunks)
        column = next(each for each in self.further.carried if each.name == name)
        reader = ShardReader(self.path, columns=[name])
        size = 0
        for batch in reader:
            elements = batch.column(name).flatten() if column.is_list else batch.column(name)
            size += elements.nbytes
        reader.close()
        return size

    def _wanted(self, columns: Sequence[str] | None) -> tuple[Column, ...]:
        names = self._default if columns is None else columns
        return tuple(
            each for each in ordered(self.columns, self.further.carried) if names is None or each.name in names
        )

    def read_group(self, index: int, columns: Sequence[str] | None = None) -> pa.RecordBatch:
        """Row group `index` as one batch in the contract's schema, with these columns or those of the reader."""
        wanted = self._wanted(columns)
        ours = [each for each in wanted if self._own_layout and each.is_number_list]
        others = [each for each in wanted if each not in ours]
        read = {each.name: self._read_list(index, each) for each in ours}
        if others:
            names = self._needed(others)
            with self._damage_named(index):
                table = self._file.read_row_group(index, columns=names, use_threads=False)
            read |= self._in_contract({name: table.column(name) for name in names}, index, others)
        return self._checked(_batch_of(wanted, read), index)

    def _read_list(self, group: int, column: Column) -> pa.ListArray:
        """A column of lists of numbers of a file that our own writer made, where each column has one chunk."""
        with self._damage_named(group):
            self._check_footer()
            chunk = self.metadata.row_group(group).column(self._names.index(column.name))
            return read_list(self._source, chunk)

    def _check_footer(self) -> None:
        """Once, and only where pyarrow is asked for what it would end the process about."""
        if not self._is_checked:
            check_footer(self._source)
            self._is_checked = True

    def _needed(self, wanted: Sequence[Column]) -> list[str]:
        """The names to read; boundaries of unknown coordinates are understood beside the rows that they divide."""
        names = [each.name for each in wanted]
        return names if self._ours or CU_SEQLENS not in names else list(dict.fromkeys([*names, INPUT_IDS]))

    def rows_at_once(self, group: int) -> int:
        """How many rows each batch of `batches(group)` has, but the last: all, or about `ROW_GROUP_TOKENS` tokens."""
        facts = self.metadata.row_group(group)
        tokens = sum(
            facts.column(index).num_values
            for index in range(facts.num_columns)
            if facts.column(index).path_in_schema.split(".")[0] == INPUT_IDS
        )
        if tokens <= 2 * files.ROW_GROUP_TOKENS:
            return max(1, int(facts.num_rows))
        return max(1, int(facts.num_rows * files.ROW_GROUP_TOKENS // tokens))

    def batches(self, group: int) -> Iterator[pa.RecordBatch]:
        """Row group `group` in batches of `rows_at_once(group)` rows, also where its writer made it very large."""
        rows = self.rows_at_once(group)
        if rows >= self.metadata.row_group(group).num_rows:
            yield self.read_group(group)
            return
        reader = ShardReader(self.path, streaming=True)
        wanted = self._wanted(None)
        names = self._needed(wanted)
        batches = reader._file.iter_batches(rows, row_groups=[group], columns=names, use_threads=False)
        first_row = 0
        while True:
            with self._damage_named(group):
                batch = next(batches, None)
            if batch is None:
                return
            read = {name: batch.column(name) for name in names}
            arrays = self._in_contract(read, group, wanted, first_row=first_row)
            yield self._checked(_batch_of(wanted, arrays), group, first_row)
            first_row += batch.num_rows

    def _checked(self, batch: pa.RecordBatch, group: int, first_row: int = 0) -> pa.RecordBatch:
        """The rows from row `first_row` of a row group on, their labels compared with their ids."""
        if LABELS in batch.schema.names and INPUT_IDS in batch.schema.names:
            row = self._first_rows[group] + first_row
            check_labels(batch.column(INPUT_IDS), batch.column(LABELS), self.path, row, of_first=False)
        return batch

    @contextlib.contextmanager
    def _damage_named(self, group: int) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, DamagedError, OSError, MemoryError, *MALFORMED) as error:
            raise UserError(f"{self.path}: row group {group} is damaged: {error}") from None

    def _in_contract(
        self,
        columns: dict[str, pa.Array | pa.ChunkedArray],
        group: int,
        wanted: Sequence[Column],
        *,
        first_row: int = 0,
    ) -> dict[str, pa.Array]:
        where = f"{self.path}: row group {group}"
        further = {each.name: each for each in wanted if each.name not in COLUMNS}
        arrays = {}
        for name, column in columns.items():
            place = f"{where}: column {name}"
            if name in further:
                arrays[name] = foreign.further_column(column, further[name], place, first_row=first_row)
            else:
                arrays[name] = foreign.list_column(column, place)
        if CU_SEQLENS in arrays and not self._ours:
            arrays[CU_SEQLENS] = foreign.boundaries(arrays[CU_SEQLENS], arrays[INPUT_IDS], where)
        return arrays

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        """All rows in order, about `ROW_GROUP_TOKENS` tokens in memory at a time."""
        for index in range(self.metadata.num_row_groups):
            yield from self.batches(index)

    def close(self) -> None:
        self._file.close()
        self._source.close()


def _batch_of(columns: Sequence[Column], arrays: dict[str, pa.Array]) -> pa.RecordBatch:
    names = [each.name for each in columns]
    further = [each for each in columns if each.name not in COLUMNS]
    kind = schema([name for name in names if name in COLUMNS], further)
    return pa.RecordBatch.from_arrays([arrays[name] for name in names], schema=kind)
