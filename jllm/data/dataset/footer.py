"""The footer of a Parquet file, looked at before pyarrow is asked for more of it.

pyarrow reads a footer with care, but ends the whole process where it is asked for the codec, type or encoding of a
column that are none it knows. The numbers that stand for them are looked at here.

Cost: some microseconds for each column of each row group.
"""

from typing import Any

import pyarrow as pa

from jllm.data.dataset.thrift import StructReader

LAST_TYPE, LAST_CODEC, LAST_ENCODING = 7, 7, 9
"""The largest numbers of `parquet.thrift`, all from 0."""
DEEPEST = 16
_TRUE, _FALSE, _I8, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)
_ROW_GROUPS, _COLUMNS, _META, _TYPE, _ENCODINGS, _CODEC = 4, 1, 3, 1, 2, 4


def check_footer(file: pa.NativeFile) -> None:
    """Look at the footer of a file that pyarrow has opened.

    Raises:
        ValueError: it holds a number that stands for nothing.
    """
    size = file.size()
    length = int.from_bytes(file.read_at(4, size - 8), "little")
    reader = _FooterReader(memoryview(file.read_at(length, size - 8 - length)), 0)
    try:
        groups = reader.fields(0).get(_ROW_GROUPS, [])
        for column in [column for group in groups for column in group[_COLUMNS]]:
            facts = column[_META]
            if not 0 <= facts[_CODEC] <= LAST_CODEC:
                raise ValueError(f"a column has the codec {facts[_CODEC]}, which is not known")
            if not 0 <= facts[_TYPE] <= LAST_TYPE:
                raise ValueError(f"a column has the type {facts[_TYPE]}, which is not known")
            if not all(0 <= encoding <= LAST_ENCODING for encoding in facts.get(_ENCODINGS, [])):
                raise ValueError("a column has an encoding that is not known")
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"its footer lacks {error}") from None


class _FooterReader(StructReader):
    """Reads structs with fields of any type; texts are passed over."""

    def fields(self, depth: int) -> dict[int, Any]:
        """Field number → value, None for a text."""
        found: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._signed()
            kind = head & 15
            found[number] = kind == _TRUE if kind in (_TRUE, _FALSE) else self._any(kind, depth + 1)
        return found

    def _signed(self) -> int:
        value = self.varint()
        return value >> 1 if value & 1 == 0 else -(value >> 1) - 1

    def _any(self, kind: int, depth: int) -> Any:
        if kind in (_I16, _I32, _I64):
            return self._signed()
        if kind in (_DOUBLE, _BINARY):
            size = 8 if kind == _DOUBLE else self.varint()
            self.position += size
            if self.position > len(self._data):
                raise ValueError("its footer is cut off")
            return None
        if kind in (_TRUE, _FALSE, _I8):  # in a list, truth is a byte
            return self._byte()
        if depth > DEEPEST or kind not in (_LIST, _SET, _MAP, _STRUCT):
            raise ValueError(f"its footer has a value of the type {kind}, {depth} deep")
        if kind == _STRUCT:
            return self.fields(depth)
        if kind == _MAP:
            count = self._count(self.varint())
            kinds = self._byte() if count else 0
            return [(self._any(kinds >> 4, depth + 1), self._any(kinds & 15, depth + 1)) for _ in range(count)]
        head = self._byte()
        count = self._count(head >> 4 if head >> 4 < 15 else self.varint())
        return [self._any(head & 15, depth + 1) for _ in range(count)]

    def _count(self, count: int) -> int:
        if count > len(self._data) - self.position:
            raise ValueError("its footer is cut off")
        return count
