"""Parquet files whose columns are lists of int32 without nulls: written, and read back.

Any reader of Parquet reads what `ListFileWriter` writes, and shards that others wrote are read by pyarrow. For our own
there is a shorter way in both directions. A general writer or reader keeps two 16-bit levels for each element, which
say where lists begin, and goes through them one by one: 40 % of the time that token ids take to be written, and half
of the time that they take to be read. Where neither a list nor an element is null, one bit an element says the same,
and numpy packs and finds those at the speed of memory.

Guarantees: a file is a function of its row groups, columns and codec alone. Each page has a checksum, which `read_list`
verifies, and each column of a row group its smallest and largest element in the footer. Pages hold whole rows, about
`PAGE_BYTES` of them, unless one row is larger than `LARGEST_PAGE_BYTES`. Data pages of version 1, plain encoding: the
oldest layout there is. Source of all numbers and names: `parquet.thrift` and `Encodings.md` of Apache Parquet's format.

Cost: the codec's, and about 1.5 ms per million elements either way (zstd level 1: 10 ms to write, 2.5 ms to read).
"""

import collections
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from jllm.data.dataset import thrift
from jllm.data.dataset.columns import Int32, Int64, from_list_array, to_list_array

PAGE_BYTES = 1 << 20
LARGEST_PAGE_BYTES = 1 << 28
MAGIC = b"PAR1"
_CODEC_NUMBERS = {"snappy": 1, "gzip": 2, "brotli": 4, "zstd": 6, "lz4": 7}
_INT32 = 1
_REQUIRED, _REPEATED = 0, 2
_CONVERTED_LIST = 3
_PLAIN, _RLE = 0, 3
_DATA_PAGE = 0


class Output(Protocol):
    """Where a file goes."""

    def write(self, data: Any, /) -> int: ...

    def tell(self) -> int: ...


class _Chunk(NamedTuple):
    """A column of a row group on its way to the file: what the footer says of it, and of each of its pages the entries,
    the size before compression, and what compression made of it."""

    name: str
    statistics: thrift.Encoded
    entries: tuple[int, ...]
    sizes: list[int]
    packed: Iterable[pa.Buffer]


class ListFileWriter:
    """Writes one file; `close` writes the footer and leaves the output open.

    Args:
        output: a binary file, at its beginning.
        schema: list columns of the type `LIST_TYPE`.
        codec: zstd (level 1), gzip, snappy, lz4, or brotli.
        metadata: goes into the footer.
        writer: name and version of the program, for the footer.
        pool: compresses the pages of a row group at the same time.
    """

    def __init__(
        self,
        output: Output,
        schema: pa.Schema,
        *,
        codec: str,
        metadata: Mapping[str, str],
        writer: str,
        pool: Executor | None = None,
    ) -> None:
        self._output = output
        self._schema = schema
        self._codec = codec
        self._map: Callable[..., Iterable[pa.Buffer]] = map if pool is None else pool.map
        self._metadata = metadata
        self._writer = writer
        self._ahead = 0 if pool is None else 1
        self._started: collections.deque[tuple[int, list[_Chunk]]] = collections.deque()
        self._groups: list[thrift.Encoded] = []
        self._rows = 0
        output.write(MAGIC)

    def write(self, batch: pa.RecordBatch) -> None:
        """Write a batch of at least one row as one row group; with a pool, while the one before it is compressed."""
        assert batch.num_rows
        chunks = [self._start(name, *from_list_array(batch.column(name))) for name in self._schema.names]
        self._started.append((batch.num_rows, chunks))
        while len(self._started) > self._ahead:
            self._finish(*self._started.popleft())

    def _start(self, name: str, values: Int32, offsets: Int64) -> "_Chunk":
        """Make the pages of a column of a row group, and have them compressed."""
        pages, entries = zip(*_pages(values, offsets), strict=True)
        sizes = [len(page) for page in pages]
        return _Chunk(name, _statistics(values), entries, sizes, self._map(self._compress, pages))

    def _finish(self, rows: int, chunks: "list[_Chunk]") -> None:
        """Write what `_start` began."""
        columns, sizes = [], []
        for chunk in chunks:
            column, size = self._write_chunk(chunk)
            columns.append(column)
            sizes.append(size)
        self._groups.append(
            thrift.struct(
                [
                    (1, thrift.array(columns)),
                    (2, thrift.i64(sum(plain for plain, _ in sizes))),
                    (3, thrift.i64(rows)),
                    (6, thrift.i64(sum(packed for _, packed in sizes))),
                ]
            )
        )
        self._rows += rows

    def _write_chunk(self, chunk: "_Chunk") -> tuple[thrift.Encoded, tuple[int, int]]:
        """Write a column of a row group; its entry for the footer, and its size before and after compression."""
        begin = self._output.tell()
        plain = 0
        for count, size, packed in zip(chunk.entries, chunk.sizes, chunk.packed, strict=True):
            header = _page_header(size, len(packed), zlib.crc32(packed), count)
            self._output.write(header)
            self._output.write(packed)
            plain += len(header) + size
        written = self._output.tell() - begin
        facts = thrift.struct(
            [
                (1, thrift.i32(_INT32)),
                (2, thrift.array([thrift.i32(_PLAIN), thrift.i32(_RLE)])),
                (3, thrift.array([thrift.text(part) for part in (chunk.name, "list", "element")])),
                (4, thrift.i32(_CODEC_NUMBERS[self._codec])),
                (5, thrift.i64(sum(chunk.entries))),
                (6, thrift.i64(plain)),
                (7, thrift.i64(written)),
                (9, thrift.i64(begin)),
                (12, chunk.statistics),
            ]
        )
        return thrift.struct([(2, thrift.i64(begin)), (3, facts)]), (plain, written)

    def _compress(self, page: NDArray[np.uint8]) -> pa.Buffer:
        # Not one for all pages: threads must not share a codec.
        codec = pa.Codec("lz4_raw" if self._codec == "lz4" else self._codec, 1 if self._codec == "zstd" else None)
        return codec.compress(page)

    def close(self) -> None:
        """Write what is left, and the footer."""
        while self._started:
            self._finish(*self._started.popleft())
        names = self._schema.names
        notes = [thrift.struct([(1, thrift.text(key)), (2, thrift.text(text))]) for key, text in self._metadata.items()]
        footer = thrift.struct(
            [
                (1, thrift.i32(1)),
                (2, thrift.array(_schema_elements(names))),
                (3, thrift.i64(self._rows)),
                (4, thrift.array(self._groups)),
                (5, thrift.array(notes)),
                (6, thrift.text(self._writer)),
                (7, thrift.array([thrift.struct([(1, thrift.struct([]))]) for _ in names])),
            ]
        )[1]
        self._output.write(footer + len(footer).to_bytes(4, "little") + MAGIC)


def _page_header(plain: int, packed: int, checksum: int, entries: int) -> bytes:
    """The header of a page: its size before and after compression, the CRC-32 of what is stored, and its entries."""
    encodings = [(2, thrift.i32(_PLAIN)), (3, thrift.i32(_RLE)), (4, thrift.i32(_RLE))]
    return thrift.struct(
        [
            (1, thrift.i32(_DATA_PAGE)),
            (2, thrift.i32(plain)),
            (3, thrift.i32(packed)),
            (4, thrift.i32(checksum - (1 << 32) if checksum >> 31 else checksum)),  # Thrift has signed numbers only
            (5, thrift.struct([(1, thrift.i32(entries)), *encodings])),
        ]
    )[1]


def _pages(values: Int32, offsets: Int64) -> Iterator[tuple[NDArray[np.uint8], int]]:
    """The pages of a column before compression, and how many entries each has: its elements, and one for each empty
    list."""
    empty = np.flatnonzero(np.diff(offsets) == 0)
    starts = offsets[:-1]
    has_element: NDArray[np.bool_] | None = None
    if len(empty):
        starts = starts + np.searchsorted(empty, np.arange(len(starts)))  # an empty list is an entry, and no element
        has_element = np.ones(len(values) + len(empty), dtype=bool)
        has_element[starts[empty]] = False
    count = len(values) + len(empty)
    continues = np.ones(count, dtype=bool)
    continues[starts] = False
    begin = taken = 0
    while begin < count:
        row = int(np.searchsorted(starts, begin + PAGE_BYTES // 4))
        end = min(int(starts[row]) if row < len(starts) else count, begin + LARGEST_PAGE_BYTES // 4)
        present = end - begin if has_element is None else int(np.count_nonzero(has_element[begin:end]))
        if has_element is None:
            levels = _levels(continues[begin:end]) + _all_one(end - begin)
        else:
            levels = _levels(continues[begin:end]) + _levels(has_element[begin:end])
        page = np.empty(len(levels) + 4 * present, dtype=np.uint8)
        page[: len(levels)] = np.frombuffer(levels, dtype=np.uint8)
        page[len(levels) :] = values[taken : taken + present].view(np.uint8)
        yield page, end - begin
        begin, taken = end, taken + present


def _levels(bits: NDArray[np.bool_]) -> bytes:
    """Levels of 0 or 1, one bit each: a single bit-packed run, behind its size."""
    data = thrift.varint(-(-len(bits) // 8) << 1 | 1) + np.packbits(bits, bitorder="little").tobytes()
    return len(data).to_bytes(4, "little") + data


def _all_one(count: int) -> bytes:
    """`count` levels of 1, as a single repeated value."""
    data = thrift.varint(count << 1) + b"\x01"
    return len(data).to_bytes(4, "little") + data


def _statistics(values: Int32) -> thrift.Encoded:
    bounds = []
    if len(values):
        bounds = [(5, values.max()), (6, values.min())]
    return thrift.struct([(3, thrift.i64(0)), *((number, thrift.binary(value.tobytes())) for number, value in bounds)])


def _schema_elements(names: Sequence[str]) -> list[thrift.Encoded]:
    """The tree of columns, each node followed by its children."""
    nodes = [thrift.struct([(4, thrift.text("schema")), (5, thrift.i32(len(names)))])]
    for name in names:
        nodes += [
            thrift.struct(
                [
                    (3, thrift.i32(_REQUIRED)),
                    (4, thrift.text(name)),
                    (5, thrift.i32(1)),
                    (6, thrift.i32(_CONVERTED_LIST)),
                    (10, thrift.struct([(3, thrift.struct([]))])),
                ]
            ),
            thrift.struct([(3, thrift.i32(_REPEATED)), (4, thrift.text("list")), (5, thrift.i32(1))]),
            thrift.struct([(1, thrift.i32(_INT32)), (3, thrift.i32(_REQUIRED)), (4, thrift.text("element"))]),
        ]
    return nodes


class DamagedError(Exception):
    """What is read is not what `ListFileWriter` wrote."""


def read_list(file: pa.NativeFile, chunk: pq.ColumnChunkMetaData) -> pa.ListArray:
    """A column of a row group of a file that `ListFileWriter` wrote.

    Args:
        file: open for reading.
        chunk: the column's entry in the footer.

    Raises:
        DamagedError: the bytes do not fit the footer, or a page has another checksum than its header says.
    """
    size = chunk.total_compressed_size
    data = memoryview(file.read_at(size, chunk.data_page_offset))
    codec = pa.Codec("lz4_raw" if chunk.compression == "LZ4" else chunk.compression.lower())
    # Arrow's memory pool keeps freed blocks; numpy's go back to the system and are faulted in anew each time.
    values = np.frombuffer(pa.allocate_buffer(4 * chunk.num_values), dtype=np.int32)
    entries = taken = position = 0
    starts = []
    try:
        while position < size:
            begin, plain, end, checksum, count = _read_header(data, position)
            packed = data[begin:end]
            if end > size or zlib.crc32(packed) != checksum:
                raise DamagedError("a page's checksum is wrong")
            page = np.frombuffer(codec.decompress(pa.py_buffer(packed), plain), dtype=np.uint8)
            continues, at = _read_levels(page, 0, count)
            has_element, at = _read_levels(page, at, count)
            found = page[at:].view(np.int32)
            if len(page) != plain or len(found) != np.count_nonzero(has_element):
                raise DamagedError("a page has another size than its header and its levels say")
            values[taken : taken + len(found)] = found
            starts.append(_values_before(np.flatnonzero(~continues), has_element) + taken)
            entries += count
            taken += len(found)
            position = end
    except (ValueError, OSError, pa.ArrowException) as error:
        raise DamagedError(str(error)) from None
    if entries != chunk.num_values:
        raise DamagedError(f"{entries} entries where the footer says {chunk.num_values}")
    offsets = np.concatenate([*starts, [taken]])
    return to_list_array(values[:taken], offsets)


def _read_header(data: memoryview, position: int) -> tuple[int, int, int, int, int]:
    """Of the page whose header stands at `position`: where it begins, its size before compression, where it ends, its
    checksum and its number of entries."""
    reader = thrift.Reader(data, position)
    fields = reader.struct()
    try:
        plain, packed, checksum, entries = fields[2], fields[3], fields[4] & 0xFFFFFFFF, fields[5][1]
        known = _page_header(plain, packed, checksum, entries)
    except (KeyError, TypeError):
        known = b""
    if data[position : reader.position] != known or min(plain, packed, entries) < 0:
        raise DamagedError("a page has another header than this library writes")
    return reader.position, plain, reader.position + packed, checksum, entries


def _values_before(entries: Int64, has_element: NDArray[np.bool_]) -> Int64:
    """How many values come before each entry."""
    if has_element.all():
        return entries
    before = np.cumsum(has_element)
    result: Int64 = before[entries] - has_element[entries]
    return result


def _read_levels(page: NDArray[np.uint8], at: int, count: int) -> tuple[NDArray[np.bool_], int]:
    """The inverse of `_levels` and `_all_one`, and where it ends in the page."""
    end = at + 4 + int.from_bytes(page[at : at + 4].tobytes(), "little")
    reader = thrift.Reader(page.data, at + 4)
    head = reader.varint()
    if head & 1:
        return np.unpackbits(page[reader.position : end], count=count, bitorder="little").view(np.bool_), end
    return np.ones(count, dtype=bool), end
