"""Packing loses nothing, takes the bytes it promises, and does not trust a footer that is wrong."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jllm.data.dataset.columns import Column, ordered, schema, to_list_array
from jllm.data.shuffle.compact import Compact, CompactColumn, Range, join_ranges
from jllm.errors import UserError
from tests.data.typed_sets import COLUMNS_OF_ANY_TYPE, EVERY_TYPE, exact_rows, typed_rows

IDS = ("input_ids",)


def lists(values: list[list[int]]) -> pa.RecordBatch:
    flat = np.array([value for row in values for value in row], np.int32)
    return pa.RecordBatch.from_arrays([to_list_array(flat, np.cumsum([0, *map(len, values)]))], schema=schema(IDS))


def compact(bounds: Range | None) -> Compact:
    column = CompactColumn(column=Column(name="input_ids"), range=bounds)
    return Compact(columns=(column,), schema=schema(IDS))


@given(
    values=st.lists(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=5), min_size=1, max_size=9),
    bits=st.integers(0, 32),
    start=st.integers(0, 3),
)
def test_lists_of_integers_of_any_range(values: list[list[int]], bits: int, start: int) -> None:
    values = [[value >> (32 - bits) if bits else 0 for value in row] for row in values]
    flat = [value for row in values for value in row]
    batch = lists(values).slice(start)
    packer = compact((min(flat), max(flat)) if flat else (0, 0))
    packed = packer.pack(batch)
    assert packer.unpack(packed).equals(batch)
    (size,) = (column.bytes for column in packer.columns)
    assert packed.num_columns == (2 if size == 3 else 1)


@pytest.mark.parametrize(
    ("bounds", "size"),
    [
        ((0, 65535), 2),
        ((0, 65536), 3),
        ((-100, 65435), 2),
        ((5, 9), 2),
        ((0, (1 << 24) - 1), 3),
        ((0, 1 << 24), 4),
        ((-(2**31), 2**31 - 1), 4),
        (None, 4),
    ],
)
def test_bytes_of_an_element(bounds: Range | None, size: int) -> None:
    assert CompactColumn(column=Column(name="x"), range=bounds).bytes == size
    assert CompactColumn(column=Column(name="x", is_list=False), range=bounds).bytes == 4


@pytest.mark.parametrize("values", [[[1, 10]], [[1], [-1]]])
def test_a_footer_that_is_wrong_is_found(values: list[list[int]]) -> None:
    with pytest.raises(UserError, match=r"but the Parquet footer says 0 to 9; write the file anew"):
        compact((0, 9)).pack(lists(values))


@given(further=COLUMNS_OF_ANY_TYPE, count=st.integers(1, 20), seed=st.integers(0, 99))
def test_every_type_is_moved_and_unpacked(further: list[Column], count: int, seed: int) -> None:
    rows = typed_rows(0, count, further, columns=IDS)
    columns = tuple(CompactColumn(column=each, range=None) for each in ordered(IDS, further))
    packer = Compact(columns=columns, schema=rows.schema)
    order = np.random.default_rng(seed).permutation(count)
    moved = packer.unpack(packer.pack(rows).take(pa.array(order)))
    expected = exact_rows([rows])
    assert exact_rows([moved]) == [expected[row] for row in order]
    assert moved.schema == rows.schema


def test_lists_of_floats_are_byte_strings() -> None:
    rows = typed_rows(0, 9, EVERY_TYPE, columns=IDS)
    columns = tuple(CompactColumn(column=each, range=None) for each in ordered(IDS, EVERY_TYPE))
    packed = Compact(columns=columns, schema=rows.schema).pack(rows)
    names = [each.name for each in ordered(IDS, EVERY_TYPE)]
    kinds = dict(zip(names, packed.schema.types, strict=True))
    assert kinds["float32 list"] == kinds["int32 list"] == pa.binary()
    assert kinds["text"] == pa.string()


def test_joined_ranges() -> None:
    assert join_ranges([(0, 5), (-3, 2)]) == (-3, 5)
    assert join_ranges([(0, 5), None]) is None
    assert join_ranges([]) is None
