"""Footers of parquet-java, the same for the same rows.

It keeps the encodings of a column in a hash set, whose order is another in every JVM; nothing reads that order. Here
they are sorted, in place, so that a job that was killed ends with the bytes of one that was not.

Guarantees: nothing else in a file changes. A footer that is not understood is left as it is.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from jllm.data.dataset.files import FOOTER_TAIL, MAGIC
from jllm.data.dataset.thrift import StructReader

_I32, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = 5, 7, 8, 9, 10, 11, 12
_ENCODINGS = (4, 1, 3, 2)
"""From the file's metadata by number: row groups, columns, metadata of a column, its encodings."""


def settle(path: Path) -> None:
    """Sort the encodings in the footer of a file."""
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - FOOTER_TAIL))
        tail = file.read(FOOTER_TAIL)
        length = int.from_bytes(tail[:4], "little")
        if tail[4:] != MAGIC or length > size - FOOTER_TAIL:
            return
        begin = size - FOOTER_TAIL - length
        file.seek(begin)
        footer = file.read(length)
        settled = with_sorted_encodings(footer)
        if settled != footer:
            file.seek(begin)
            file.write(settled)
            file.flush()
            os.fsync(file.fileno())


def with_sorted_encodings(footer: bytes) -> bytes:
    """The same footer, of the same length."""
    result = bytearray(footer)
    try:
        for begin, end in _Walk(footer).places():
            numbers = footer[begin:end]
            if max(numbers, default=0) < 0x80:  # each is a byte
                result[begin:end] = bytes(sorted(numbers))
    except ValueError:
        return footer
    return bytes(result)


class _Walk(StructReader):
    """Through all of a footer, for the places of the lists of encodings."""

    def __init__(self, data: bytes) -> None:
        super().__init__(memoryview(data), 0)

    def places(self) -> Iterator[tuple[int, int]]:
        """Begin and end of the elements of each list."""
        yield from self._value(_STRUCT, _ENCODINGS)

    def _value(self, kind: int, wanted: tuple[int, ...] | None) -> Iterator[tuple[int, int]]:
        """Go behind a value; `wanted` are the fields that lead from it to a list of encodings, if any do."""
        if kind in (_LIST, _SET):
            head = self._byte()
            count = head >> 4 if head >> 4 < 15 else self.varint()
            begin = self.position
            for _ in range(count):
                yield from self._value(max(3, head & 15), wanted)
            if wanted == () and head & 15 == _I32:
                yield begin, self.position
        elif kind == _STRUCT:
            number = 0
            while head := self._byte():
                number = number + (head >> 4) if head >> 4 else self.varint() >> 1
                inner = wanted[1:] if wanted and wanted[0] == number else None
                if head & 15 > 2:  # true and false are in the head
                    yield from self._value(head & 15, inner)
        elif kind == _MAP:
            count = self.varint()
            kinds = self._byte() if count else 0
            for _ in range(count):
                yield from self._value(kinds >> 4, None)
                yield from self._value(kinds & 15, None)
        elif kind == _BINARY:
            self._skip(self.varint())
        elif kind in (3, _DOUBLE):
            self._skip(1 if kind == 3 else 8)
        elif kind in (4, _I32, 6):
            self.varint()
        else:
            raise ValueError(f"unexpected type {kind}")

    def _skip(self, count: int) -> None:
        if count > len(self._data) - self.position:
            raise ValueError("a footer is cut off")
        self.position += count
