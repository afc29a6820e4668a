"""Thrift's compact protocol, against what its specification says of each value and what pyarrow reads."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jllm.data.dataset import thrift


@pytest.mark.parametrize(
    ("value", "data"), [(0, b"\0"), (1, b"\1"), (127, b"\x7f"), (128, b"\x80\1"), (300, b"\xac\2")]
)
def test_varint(value: int, data: bytes) -> None:
    assert thrift.varint(value) == data


def test_small_negative_numbers_are_short() -> None:
    assert [thrift.i32(value)[1] for value in (0, -1, 1, -2)] == [b"\0", b"\1", b"\2", b"\3"]


def test_long_arrays_have_a_longer_head() -> None:
    assert thrift.array([thrift.i32(0)] * 14)[1][:1] == bytes([14 << 4 | 5])
    assert thrift.array([thrift.i32(0)] * 15)[1][:2] == bytes([15 << 4 | 5, 15])
    assert thrift.array([])[1] == bytes([12])


@given(
    fields=st.dictionaries(
        st.integers(1, 15), st.integers(-(2**63), 2**63 - 1) | st.dictionaries(st.integers(1, 15), st.integers(0, 9))
    )
)
def test_structs_of_numbers_are_read_back(fields: dict[int, int | dict[int, int]]) -> None:
    encoded = []
    for number, value in sorted(fields.items()):
        if isinstance(value, dict):
            encoded.append((number, thrift.struct([(key, thrift.i32(one)) for key, one in sorted(value.items())])))
        else:
            encoded.append((number, thrift.i64(value)))
    data = b"before" + thrift.struct(encoded)[1]
    reader = thrift.StructReader(memoryview(data), 6)
    assert reader.struct() == fields
    assert reader.position == len(data)


@pytest.mark.parametrize(
    ("data", "said"), [(b"\x15", "cut off"), (b"\x18\0", "unexpected type 8"), (b"\x15" + b"\xff" * 11, "too many")]
)
def test_what_is_no_struct(data: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        thrift.StructReader(memoryview(data), 0).struct()
