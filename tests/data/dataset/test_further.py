"""Which columns travel: by type, and by what the files of a data set have in common."""

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jllm.data.dataset.columns import Column
from jllm.data.dataset.further import FurtherColumns, column_of, common, further_of
from tests.data.typed_sets import COLUMNS_OF_ANY_TYPE

CARRIED = {
    "int8": (pa.int8(), "int32"),
    "uint64": (pa.uint64(), "int32"),
    "half": (pa.float16(), "float32"),
    "double": (pa.float64(), "float32"),
    "large text": (pa.large_string(), "text"),
    "text view": (pa.string_view(), "text"),
    "category": (pa.dictionary(pa.int8(), pa.string()), "text"),
    "category of numbers": (pa.dictionary(pa.int8(), pa.int64()), "int32"),
    "list": (pa.list_(pa.float32()), "list<float32>"),
    "large list": (pa.large_list(pa.large_string()), "list<text>"),
    "fixed list": (pa.list_(pa.float64(), 3), "list<float32>"),
    "list of categories": (pa.list_(pa.dictionary(pa.int32(), pa.string())), "list<text>"),
}
LEFT_OUT = {
    "bool": pa.bool_(),
    "bytes": pa.binary(),
    "date": pa.date32(),
    "time": pa.timestamp("us"),
    "decimal": pa.decimal128(10, 2),
    "struct": pa.struct([("a", pa.int32())]),
    "map": pa.map_(pa.string(), pa.int32()),
    "list of lists": pa.list_(pa.list_(pa.int32())),
    "nothing": pa.null(),
}


@pytest.mark.parametrize(("kind", "name"), CARRIED.values(), ids=CARRIED.keys())
def test_types_that_travel(kind: pa.DataType, name: str) -> None:
    column = column_of(pa.field("x", kind))
    assert column is not None
    assert column.type_name == name
    further = further_of(pa.schema([("input_ids", pa.list_(pa.int32())), ("x", kind)]))
    assert further.types == {"x": name}
    assert further.rounded == ({"x"} if "double" in str(kind) else set())


@pytest.mark.parametrize("kind", LEFT_OUT.values(), ids=LEFT_OUT.keys())
def test_types_that_do_not_are_named(kind: pa.DataType) -> None:
    further = further_of(pa.schema([("x", kind), ("y", pa.int32())]))
    assert further.types == {"y": "int32"}
    (line,) = further.warnings()
    assert line.startswith(f"column x is left out: {kind} is no type")


def test_a_long_type_is_shown_in_short() -> None:
    kind = pa.struct([(f"field_{number}", pa.int32()) for number in range(50)])
    (line,) = further_of(pa.schema([("x", kind)])).warnings()
    assert len(line) < 200
    assert "..." in line


def test_two_columns_of_one_name_are_left_out() -> None:
    assert further_of(pa.schema([("x", pa.int32()), ("x", pa.string())])).left_out == {
        "x": "several columns have this name"
    }


def of(*columns: Column, **left_out: str) -> FurtherColumns:
    return FurtherColumns(carried=columns, left_out=left_out)


A, B = Column(name="a"), Column(name="b", element="text")


def test_what_all_have_travels() -> None:
    assert common({}) == FurtherColumns()
    assert common({"1": of(A, B), "2": of(A, B)}) == of(A, B)
    assert common({"1": of(A, B), "2": of(A), "3": of(A, B)}) == of(A, b="it is in 1, not in 2")
    assert common({"1": of(), "2": of(A)}) == of(a="it is in 2, not in 1")
    other = Column(name="a", is_list=False)
    assert common({"1": of(A), "2": of(other)}) == of(a="it is list<int32> in 1, int32 in 2")
    assert common({"1": of(A), "2": of(a="a struct")}) == of(a="a struct")


@given(found=st.lists(COLUMNS_OF_ANY_TYPE, max_size=4))
def test_every_column_travels_or_is_named(found: list[list[Column]]) -> None:
    files = {str(number): of(*columns) for number, columns in enumerate(found)}
    result = common(files)
    names = {column.name for columns in found for column in columns}
    assert {*result.types, *result.left_out} == names
    assert not result.types.keys() & result.left_out.keys()
    assert all(column in columns for column in result.carried for columns in found)
    assert common({"all": result, "again": result}) == result
