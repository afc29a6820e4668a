"""Pages of lists of numbers of 4 bytes without nulls, as token ids are: made, and read back.

A page is what Parquet compresses and checks at once: levels, which say where lists begin, and values. A general writer
or reader keeps two 16-bit levels for each element and goes through them one by one: 40 % of the time that token ids
take to be written, and half of the time that they take to be read. Where neither a list nor an element is null, one bit
an element says the same, and numpy packs and finds those at the speed of memory.

Guarantees: any reader of Parquet reads these pages; each has a checksum, which `read_list` verifies. Pages hold whole
rows, about `PAGE_BYTES` of them, unless one row is larger than `LARGEST_PAGE_BYTES`. Data pages of version 1, plain
encoding: the oldest layout there is. Source of all numbers and names: `parquet.thrift` and `Encodings.md` of Apache
Parquet's format.

Cost: the codec's, and about 1.5 ms per million elements either way (zstd level 1: 10 ms to write, 2.5 ms to read).
"""

import zlib
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from jllm.data.dataset import thrift
from jllm.data.dataset.columns import Int64, Numbers, to_list_array

PAGE_BYTES = 1 << 20
LARGEST_PAGE_BYTES = 1 << 28
PLAIN, RLE = 0, 3
_DATA_PAGE = 0


def page_header(plain: int, packed: int, checksum: int, entries: int) -> bytes:
    """The header of a page: its size before and after compression, the CRC-32 of what is stored, and its entries."""
    encodings = [(2, thrift.i32(PLAIN)), (3, thrift.i32(RLE)), (4, thrift.i32(RLE))]
    return thrift.struct(
        [
            (1, thrift.i32(_DATA_PAGE)),
            (2, thrift.i32(plain)),
            (3, thrift.i32(packed)),
            (4, thrift.i32(checksum - (1 << 32) if checksum >> 31 else checksum)),  # Thrift has signed numbers only
            (5, thrift.struct([(1, thrift.i32(entries)), *encodings])),
        ]
    )[1]


def list_pages(values: Numbers, offsets: Int64) -> Iterator[tuple[NDArray[np.uint8], int]]:
    """The pages of a column before compression, and how many entries each has: its elements, and one for each empty
    list."""
    starts, continues, has_element = entries_of(offsets)
    count = len(continues)
    begin = taken = 0
    while begin < count:
        row = int(np.searchsorted(starts, begin + PAGE_BYTES // 4))
        end = min(int(starts[row]) if row < len(starts) else count, begin + LARGEST_PAGE_BYTES // 4)
        present = end - begin if has_element is None else int(np.count_nonzero(has_element[begin:end]))
        levels = levels_of(continues[begin:end], None if has_element is None else has_element[begin:end])
        page = np.empty(len(levels) + 4 * present, dtype=np.uint8)
        page[: len(levels)] = np.frombuffer(levels, dtype=np.uint8)
        page[len(levels) :] = values[taken : taken + present].view(np.uint8)
        yield page, end - begin
        begin, taken = end, taken + present


def entries_of(offsets: Int64) -> tuple[Int64, NDArray[np.bool_], NDArray[np.bool_] | None]:
    """The entries of lists, which are their elements, and one for each empty list.

    Returns:
        [rows] the first entry of each list; [entries] whether an entry goes on with the list of the one before;
        [entries] whether it is an element, None where all are.
    """
    empty = np.flatnonzero(np.diff(offsets) == 0)
    starts = offsets[:-1]
    count = int(offsets[-1]) + len(empty)
    has_element: NDArray[np.bool_] | None = None
    if len(empty):
        starts = starts + np.searchsorted(empty, np.arange(len(starts)))  # an empty list is an entry, and no element
        has_element = np.ones(count, dtype=bool)
        has_element[starts[empty]] = False
    continues = np.ones(count, dtype=bool)
    continues[starts] = False
    return starts, continues, has_element


def levels_of(continues: NDArray[np.bool_], has_element: NDArray[np.bool_] | None) -> bytes:
    """What stands before the values of a page: the levels of its entries."""
    return _levels(continues) + (_all_one(len(continues)) if has_element is None else _levels(has_element))


def _levels(bits: NDArray[np.bool_]) -> bytes:
    """Levels of 0 or 1, one bit each: a single bit-packed run, behind its size."""
    data = thrift.varint(-(-len(bits) // 8) << 1 | 1) + np.packbits(bits, bitorder="little").tobytes()
    return len(data).to_bytes(4, "little") + data


def _all_one(count: int) -> bytes:
    """`count` levels of 1, as a single repeated value."""
    data = thrift.varint(count << 1) + b"\x01"
    return len(data).to_bytes(4, "little") + data


class DamagedError(Exception):
    """What is read is not what `ColumnFileWriter` wrote."""


def read_list(file: pa.NativeFile, chunk: pq.ColumnChunkMetaData) -> pa.ListArray:
    """A column of lists of numbers, of a row group of a file that `ColumnFileWriter` wrote.

    Args:
        file: open for reading.
        chunk: the column's entry in the footer.

    Raises:
        DamagedError: the bytes do not fit the footer, or a page has another checksum than its header says.
    """
    size = chunk.total_compressed_size
    data = memoryview(file.read_at(size, chunk.data_page_offset))
    try:
        _check_counts(data, chunk.num_values)
    except ValueError as error:
        raise DamagedError(str(error)) from None
    codec = pa.Codec("lz4_raw" if chunk.compression == "LZ4" else chunk.compression.lower())
    # Arrow's memory pool keeps freed blocks; numpy's go back to the system and are faulted in anew each time.
    kind = np.dtype(np.float32 if chunk.physical_type == "FLOAT" else np.int32)
    values = np.frombuffer(pa.allocate_buffer(4 * chunk.num_values), dtype=kind)
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
            found = page[at:].view(kind)
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


def _check_counts(data: memoryview, entries: int) -> None:
    """That the pages say what the footer says, before memory is taken for it; an entry has a bit in its page."""
    position = counted = 0
    while position < len(data):
        _, plain, position, _, count = _read_header(data, position)
        if count > 8 * plain:
            raise DamagedError(f"a page of {plain:,} bytes says that it has {count:,} entries")
        counted += count
    if counted != entries:
        raise DamagedError(f"{counted} entries where the footer says {entries}")


def _read_header(data: memoryview, position: int) -> tuple[int, int, int, int, int]:
    """Of the page whose header stands at `position`: where it begins, its size before compression, where it ends, its
    checksum and its number of entries."""
    reader = thrift.StructReader(data, position)
    fields = reader.struct()
    try:
        plain, packed, checksum, entries = fields[2], fields[3], fields[4] & 0xFFFFFFFF, fields[5][1]
        known = page_header(plain, packed, checksum, entries)
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
    reader = thrift.StructReader(page.data, at + 4)
    head = reader.varint()
    if head & 1:
        return np.unpackbits(page[reader.position : end], count=count, bitorder="little").view(np.bool_), end
    return np.ones(count, dtype=bool), end
