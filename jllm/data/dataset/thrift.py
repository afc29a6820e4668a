"""As much of Thrift's compact protocol as Parquet's footer and page headers are made of.

A struct is a list of fields in ascending order of their numbers. Source: the compact protocol's specification in the
Apache Thrift project, and `parquet.thrift` for what the numbers mean.
"""

from collections.abc import Iterable, Sequence
from typing import Any

_I32, _I64, _BINARY, _LIST, _STRUCT = 5, 6, 8, 9, 12
Encoded = tuple[int, bytes]
"""A value: its type in the protocol, and its bytes."""


def varint(value: int) -> bytes:
    """An unsigned number, seven bits a byte, lowest first."""
    assert value >= 0
    result = bytearray()
    while value > 0x7F:
        result.append(value & 0x7F | 0x80)
        value >>= 7
    result.append(value)
    return bytes(result)


def _zigzag(value: int) -> bytes:
    return varint(value << 1 if value >= 0 else (-value << 1) - 1)


def i32(value: int) -> Encoded:
    """A signed number of 32 bits; enumerations are written as such."""
    return _I32, _zigzag(value)


def i64(value: int) -> Encoded:
    """A signed number of 64 bits."""
    return _I64, _zigzag(value)


def binary(value: bytes) -> Encoded:
    """Bytes of any length."""
    return _BINARY, varint(len(value)) + value


def text(value: str) -> Encoded:
    """A text, as UTF-8."""
    return binary(value.encode())


def array(values: Sequence[Encoded]) -> Encoded:
    """A list of values of one type; structs where there are none."""
    kind = values[0][0] if values else _STRUCT
    short = len(values) < 15
    head = bytes([(len(values) if short else 15) << 4 | kind]) + (b"" if short else varint(len(values)))
    return _LIST, head + b"".join(data for _, data in values)


def struct(fields: Iterable[tuple[int, Encoded | None]]) -> Encoded:
    """Fields by number, ascending; None leaves one out."""
    result = bytearray()
    last = 0
    for number, value in fields:
        if value is None:
            continue
        assert last < number < last + 16
        result.append(number - last << 4 | value[0])
        result += value[1]
        last = number
    result.append(0)
    return _STRUCT, bytes(result)


class StructReader:
    """Reads structs of numbers and structs, which is all that the header of a data page is, from a buffer.

    Raises:
        ValueError: the bytes are no such struct.
    """

    def __init__(self, data: memoryview, position: int) -> None:
        self._data = data
        self.position = position

    def _byte(self) -> int:
        if self.position >= len(self._data):
            raise ValueError("a header is cut off")
        self.position += 1
        return self._data[self.position - 1]

    def varint(self) -> int:
        """An unsigned number."""
        value = shift = 0
        while shift < 70:
            byte = self._byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
        raise ValueError("a number has too many digits")

    def struct(self) -> dict[int, Any]:
        """Field number → int, or the dict of a struct."""
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            number += head >> 4
            kind = head & 15
            if kind in (_I32, _I64):
                value = self.varint()
                fields[number] = value >> 1 if value & 1 == 0 else -(value >> 1) - 1
            elif kind == _STRUCT:
                fields[number] = self.struct()
            else:
                raise ValueError(f"field {number} has the unexpected type {kind}")
        return fields
