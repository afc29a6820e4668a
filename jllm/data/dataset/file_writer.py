"""Writes Parquet files of the columns that shards have, without nulls.

pyarrow writes them too, but takes longer for lists of numbers (see `list_codec.py`), and what it writes changes with
its version. Any reader of Parquet reads what `ColumnFileWriter` writes.

Guarantees: a file is a function of its row groups, columns and codec alone. Each page has a checksum, and each column
of integers of a row group its smallest and largest element in the footer. No dictionary.
"""

import collections
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from jllm.data.dataset import thrift
from jllm.data.dataset.columns import FLOAT32, INT32, TEXT, Column, Int64, from_array, split_lists
from jllm.data.dataset.list_codec import PLAIN, RLE, list_pages, page_header
from jllm.data.dataset.plain_pages import number_pages, text_pages

MAGIC = b"PAR1"
_CODEC_NUMBERS = {"snappy": 1, "gzip": 2, "brotli": 4, "zstd": 6, "lz4": 7}
_TYPE_NUMBERS = {INT32: 1, FLOAT32: 4, TEXT: 6}
_REQUIRED, _REPEATED = 0, 2
_CONVERTED_TEXT, _CONVERTED_LIST = 0, 3
_LOGICAL_TEXT, _LOGICAL_LIST = 1, 3


class Output(Protocol):
    """Where a file goes."""

    def write(self, data: Any, /) -> int: ...

    def tell(self) -> int: ...


class MadeColumn(NamedTuple):
    """A column of a row group that is made: what the footer says of it, its number of entries, and its bytes before and
    after compression, page headers included."""

    statistics: thrift.Encoded
    entries: int
    plain: int
    packed: int


class MadeGroup(NamedTuple):
    """A row group that is made, perhaps by another process; its columns' bytes lie one behind the other."""

    rows: int
    columns: tuple[MadeColumn, ...]


class _ColumnChunk(NamedTuple):
    """A column of a row group on its way to the file: what the footer says of it, and of each of its pages the entries,
    the size before compression, and what compression made of it."""

    column: Column
    statistics: thrift.Encoded
    entries: tuple[int, ...]
    sizes: list[int]
    packed: Iterable[pa.Buffer]


class ColumnFileWriter:
    """Writes one file; `close` writes the footer and leaves the output open.

    Args:
        output: a binary file, at its beginning.
        columns: what every batch has, in this order.
        codec: zstd (level 1), gzip, snappy, lz4, or brotli.
        metadata: goes into the footer.
        writer: name and version of the program, for the footer.
        pool: compresses the pages of a row group at the same time.
    """

    def __init__(
        self,
        output: Output,
        columns: Sequence[Column],
        *,
        codec: str,
        metadata: Mapping[str, str],
        writer: str,
        pool: Executor | None = None,
    ) -> None:
        self._output = output
        self._columns = columns
        self._codec = codec
        self._map: Callable[..., Iterable[pa.Buffer]] = map if pool is None else pool.map
        self._metadata = metadata
        self._writer = writer
        self._ahead = 0 if pool is None else 1
        self._started: collections.deque[tuple[int, list[_ColumnChunk]]] = collections.deque()
        self._groups: list[thrift.Encoded] = []
        self._rows = 0
        output.write(MAGIC)

    def write(self, batch: pa.RecordBatch) -> None:
        """Write a batch of at least one row as one row group; with a pool, while the one before it is compressed."""
        assert batch.num_rows
        chunks = [self._start(column, batch.column(column.name)) for column in self._columns]
        self._started.append((batch.num_rows, chunks))
        while len(self._started) > self._ahead:
            self._finish(*self._started.popleft())

    def _start(self, column: Column, array: pa.Array) -> "_ColumnChunk":
        """Make the pages of a column of a row group, and have them compressed."""
        pages, entries = zip(*_pages(column, array), strict=True)
        sizes = [len(page) for page in pages]
        codecs = [self._codec] * len(pages)
        return _ColumnChunk(column, _statistics(column, array), entries, sizes, self._map(_compress, pages, codecs))

    def _finish(self, rows: int, chunks: "list[_ColumnChunk]") -> None:
        """Write what `_start` began."""
        begin = self._output.tell()
        self._note(begin, MadeGroup(rows, tuple(_packed(chunk, self._output.write) for chunk in chunks)))

    def append(self, group: MadeGroup, data: Any) -> None:
        """Write a row group that `make_group` made of the columns of this file, in its codec."""
        assert not self._started
        begin = self._output.tell()
        self._output.write(data)
        self._note(begin, group)

    def _note(self, begin: int, group: MadeGroup) -> None:
        """Keep for the footer what was written of a row group from byte `begin` on."""
        entries = []
        for column, made in zip(self._columns, group.columns, strict=True):
            facts = thrift.struct(
                [
                    (1, thrift.i32(_TYPE_NUMBERS[column.element])),
                    (2, thrift.array([thrift.i32(PLAIN), thrift.i32(RLE)])),
                    (3, thrift.array([thrift.text(name) for name in _path(column)])),
                    (4, thrift.i32(_CODEC_NUMBERS[self._codec])),
                    (5, thrift.i64(made.entries)),
                    (6, thrift.i64(made.plain)),
                    (7, thrift.i64(made.packed)),
                    (9, thrift.i64(begin)),
                    (12, made.statistics),
                ]
            )
            entries.append(thrift.struct([(2, thrift.i64(begin)), (3, facts)]))
            begin += made.packed
        self._groups.append(
            thrift.struct(
                [
                    (1, thrift.array(entries)),
                    (2, thrift.i64(sum(made.plain for made in group.columns))),
                    (3, thrift.i64(group.rows)),
                    (6, thrift.i64(sum(made.packed for made in group.columns))),
                ]
            )
        )
        self._rows += group.rows

    def close(self) -> None:
        """Write what is left, and the footer."""
        while self._started:
            self._finish(*self._started.popleft())
        notes = [thrift.struct([(1, thrift.text(key)), (2, thrift.text(text))]) for key, text in self._metadata.items()]
        footer = thrift.struct(
            [
                (1, thrift.i32(1)),
                (2, thrift.array(_schema_elements(self._columns))),
                (3, thrift.i64(self._rows)),
                (4, thrift.array(self._groups)),
                (5, thrift.array(notes)),
                (6, thrift.text(self._writer)),
                (7, thrift.array([thrift.struct([(1, thrift.struct([]))]) for _ in self._columns])),
            ]
        )[1]
        self._output.write(footer + len(footer).to_bytes(4, "little") + MAGIC)


def make_group(
    columns: Sequence[Column], batch: pa.RecordBatch, codec: str, write: Callable[[Any], object]
) -> MadeGroup:
    """A batch of at least one row as a row group, for `ColumnFileWriter.append`; its bytes are given to `write`."""
    made = []
    for column in columns:
        array = batch.column(column.name)
        pages = (
            (count, len(page), _compress(page, codec)) for page, count in _pages(column, array)
        )  # each is compressed while it lies in the cache
        entries, sizes, packed = zip(*pages, strict=True)
        made.append(_packed(_ColumnChunk(column, _statistics(column, array), entries, list(sizes), packed), write))
    return MadeGroup(batch.num_rows, tuple(made))


def _packed(chunk: _ColumnChunk, write: Callable[[Any], object]) -> MadeColumn:
    """Write the pages of a column, each behind its header."""
    plain = written = 0
    for count, size, packed in zip(chunk.entries, chunk.sizes, chunk.packed, strict=True):
        header = page_header(size, len(packed), zlib.crc32(packed), count)
        write(header)
        write(packed)
        plain += len(header) + size
        written += len(header) + len(packed)
    return MadeColumn(chunk.statistics, sum(chunk.entries), plain, written)


def _compress(page: NDArray[np.uint8], name: str) -> pa.Buffer:
    # Not one for all pages: threads must not share a codec.
    codec = pa.Codec("lz4_raw" if name == "lz4" else name, 1 if name == "zstd" else None)
    return codec.compress(page)


def _pages(column: Column, array: pa.Array) -> Iterator[tuple[NDArray[np.uint8], int]]:
    """The pages of a column before compression, and how many entries each has."""
    elements: pa.Array = array
    offsets: Int64 | None = None
    if column.is_list:
        elements, offsets = split_lists(array)
    if column.element == TEXT:
        return text_pages(elements, offsets)
    numbers = from_array(elements)
    return number_pages(numbers) if offsets is None else list_pages(numbers, offsets)


def _path(column: Column) -> tuple[str, ...]:
    return (column.name, "list", "element") if column.is_list else (column.name,)


def _statistics(column: Column, array: pa.Array) -> thrift.Encoded:
    """No nulls, and of integers the range."""
    bounds = []
    if column.element == INT32:
        values = from_array(split_lists(array)[0] if column.is_list else array)
        if len(values):
            bounds = [(5, values.max()), (6, values.min())]
    return thrift.struct([(3, thrift.i64(0)), *((number, thrift.binary(value.tobytes())) for number, value in bounds)])


def _schema_elements(columns: Sequence[Column]) -> list[thrift.Encoded]:
    """The tree of columns, each node followed by its children."""
    nodes = [thrift.struct([(4, thrift.text("schema")), (5, thrift.i32(len(columns)))])]
    for column in columns:
        leaf = column.name
        if column.is_list:
            leaf = "element"
            nodes += [
                thrift.struct(
                    [
                        (3, thrift.i32(_REQUIRED)),
                        (4, thrift.text(column.name)),
                        (5, thrift.i32(1)),
                        (6, thrift.i32(_CONVERTED_LIST)),
                        (10, _logical(_LOGICAL_LIST)),
                    ]
                ),
                thrift.struct([(3, thrift.i32(_REPEATED)), (4, thrift.text("list")), (5, thrift.i32(1))]),
            ]
        is_text = column.element == TEXT
        nodes.append(
            thrift.struct(
                [
                    (1, thrift.i32(_TYPE_NUMBERS[column.element])),
                    (3, thrift.i32(_REQUIRED)),
                    (4, thrift.text(leaf)),
                    (6, thrift.i32(_CONVERTED_TEXT) if is_text else None),
                    (10, _logical(_LOGICAL_TEXT) if is_text else None),
                ]
            )
        )
    return nodes


def _logical(number: int) -> thrift.Encoded:
    """A member of the union of logical types that says no more than its number."""
    return thrift.struct([(number, thrift.struct([]))])
