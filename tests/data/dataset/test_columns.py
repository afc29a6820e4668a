"""Columns of every type: names, order, Arrow arrays to numpy and back, and what an absent column means."""

import itertools

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jllm.data.dataset.columns import (
    CU_SEQLENS,
    ELEMENTS,
    INPUT_IDS,
    LABELS,
    LIST_TYPE,
    Column,
    bytes_before,
    conform,
    from_array,
    from_list_array,
    join_lists,
    list_of,
    ordered,
    schema,
    split_lists,
    text_bytes,
    to_array,
    to_list_array,
)
from tests.data.sets import rows_of
from tests.data.typed_sets import EVERY_TYPE, typed_rows, values_of

TEXTS = st.lists(st.text(max_size=8), max_size=20)
LENGTHS = st.lists(st.integers(0, 4), max_size=20)


@pytest.mark.parametrize("column", EVERY_TYPE, ids=lambda column: column.type_name)
def test_a_types_name_names_it(column: Column) -> None:
    assert Column.named(column.name, column.type_name) == column
    assert (column.type == list_of(column.element)) == column.is_list


@pytest.mark.parametrize("name", ["uint32", "list<double>", "list<list<int32>>", "", "list<int32"])
def test_unknown_type_names(name: str) -> None:
    with pytest.raises(ValueError, match="unknown type"):
        Column.named("x", name)


def test_order_is_the_contracts_then_by_name() -> None:
    further = [Column(name="b"), Column(name="a", element="text", is_list=False)]
    assert schema([CU_SEQLENS, INPUT_IDS], further).names == [INPUT_IDS, CU_SEQLENS, "a", "b"]
    assert [each.name for each in ordered([LABELS], further)] == [LABELS, "a", "b"]
    assert not any(field.nullable for field in schema([INPUT_IDS], further))


@given(lengths=LENGTHS, start=st.integers(0, 5), element=st.sampled_from(sorted(ELEMENTS)))
def test_lists_are_split_and_joined(lengths: list[int], start: int, element: str) -> None:
    column = values_of(Column(name="x", element=element), len(lengths), seed=1).slice(start)
    elements, offsets = split_lists(column)
    assert offsets[0] == 0
    assert len(elements) == offsets[-1]
    again = join_lists(elements, offsets)
    again.validate(full=True)
    assert again.type == list_of(element)
    assert str(again) == str(column)


def test_values_are_not_copied() -> None:
    values = np.arange(6, dtype=np.int32)
    array = to_list_array(values, np.array([0, 2, 6]))
    assert array.type == LIST_TYPE
    found, offsets = from_list_array(array.slice(1))
    assert np.shares_memory(found, values)
    assert (found.tolist(), offsets.tolist()) == ([2, 3, 4, 5], [0, 4])
    floats = to_list_array(values.astype(np.float32), np.array([0, 2, 6]))
    assert floats.type == list_of("float32")
    with pytest.raises(TypeError):
        to_list_array(values.astype(np.float64), np.array([0, 6]))


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint8, np.float32, np.float16])
def test_numbers_there_and_back(kind: type) -> None:
    numbers = np.arange(9).astype(kind)
    assert from_array(to_array(numbers).slice(2)).tolist() == numbers[2:].tolist()
    assert from_array(to_array(numbers[::2])).dtype == kind
    assert len(from_array(pa.array([], pa.from_numpy_dtype(kind)))) == 0


@given(texts=TEXTS, start=st.integers(0, 5))
def test_bytes_of_texts(texts: list[str], start: int) -> None:
    array = pa.array(texts, pa.string()).slice(start)
    data, offsets = text_bytes(array)
    found = [bytes(data[a:b]).decode() for a, b in itertools.pairwise(offsets)]
    assert found == texts[start:]
    lengths = [4 + len(text.encode()) for text in texts[start:]]
    assert bytes_before(array).tolist() == np.cumsum([0, *lengths]).tolist()


def test_bytes_of_lists_and_numbers() -> None:
    lists = pa.array([["a", "bcd"], [], ["é"]], list_of("text"))
    assert bytes_before(lists).tolist() == [0, 12, 12, 18]
    assert bytes_before(lists.slice(1)).tolist() == [0, 0, 6]
    assert bytes_before(pa.array([[1.0], [], [2.0, 3.0]], list_of("float32"))).tolist() == [0, 4, 4, 12]
    assert bytes_before(pa.array([1, 2], pa.int32())).tolist() == [0, 4, 8]


def test_absent_columns_mean_all_trained_and_one_document() -> None:
    rows = rows_of(0, 5, columns=[INPUT_IDS])
    full = conform(rows, (INPUT_IDS, LABELS, CU_SEQLENS))
    assert full.column(LABELS) == rows.column(INPUT_IDS)
    assert full.column(CU_SEQLENS).to_pylist() == [[0, len(ids)] for ids in rows.column(INPUT_IDS).to_pylist()]
    assert conform(full, (INPUT_IDS, LABELS, CU_SEQLENS)) is full


def test_further_columns_are_never_made_up() -> None:
    rows = typed_rows(0, 5, EVERY_TYPE, columns=[INPUT_IDS])
    assert conform(rows, (INPUT_IDS, LABELS), EVERY_TYPE).schema == schema([INPUT_IDS, LABELS], EVERY_TYPE)
    with pytest.raises(AssertionError):
        conform(rows, (INPUT_IDS,), [*EVERY_TYPE, Column(name="other")])
