"""Counts of tokens against a count of each row by hand."""

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from jllm.data.dataset.columns import CU_SEQLENS, INPUT_IDS, LABELS, schema, to_list_array
from jllm.data.dataset.token_counts import count_trained, real_lengths


@st.composite
def packed_rows(draw: st.DrawFn) -> list[dict[str, list[int]]]:
    """Rows of some documents and some padding, with random labels."""
    rows = []
    for _ in range(draw(st.integers(1, 8))):
        documents = draw(st.lists(st.integers(0, 4), max_size=4))
        padding = draw(st.integers(0, 3))
        length = sum(documents) + padding
        labels = draw(st.lists(st.sampled_from([-100, 5]), min_size=length, max_size=length))
        boundaries = np.cumsum([0, *documents]).tolist()
        rows.append({INPUT_IDS: [7] * length, LABELS: labels, CU_SEQLENS: boundaries})
    return rows


def batch_of(rows: list[dict[str, list[int]]], columns: tuple[str, ...]) -> pa.RecordBatch:
    def array(name: str) -> pa.Array:
        values = np.array([value for row in rows for value in row[name]], np.int32)
        return to_list_array(values, np.cumsum([0, *(len(row[name]) for row in rows)]))

    return pa.RecordBatch.from_arrays([array(name) for name in columns], schema=schema(columns))


@given(rows=packed_rows())
def test_all_columns(rows: list[dict[str, list[int]]]) -> None:
    batch = batch_of(rows, (INPUT_IDS, LABELS, CU_SEQLENS))
    assert real_lengths(batch).tolist() == [row[CU_SEQLENS][-1] for row in rows]
    firsts = [{0, *row[CU_SEQLENS]} for row in rows]
    trained = [
        sum(row[LABELS][at] != -100 for at in range(row[CU_SEQLENS][-1]) if at not in first)
        for row, first in zip(rows, firsts, strict=True)
    ]
    assert count_trained(batch) == sum(trained)


@given(rows=packed_rows())
def test_ids_alone_are_one_document_a_row(rows: list[dict[str, list[int]]]) -> None:
    batch = batch_of(rows, (INPUT_IDS,))
    lengths = [len(row[INPUT_IDS]) for row in rows]
    assert real_lengths(batch).tolist() == lengths
    assert count_trained(batch) == sum(max(0, length - 1) for length in lengths)
