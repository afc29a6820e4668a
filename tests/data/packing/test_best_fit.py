"""Best-fit packing: the bins of the textbook, and the rows made of them."""

import itertools
import os

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jllm.data.dataset.shards import count_trained
from jllm.data.packing.best_fit import BestFitPacker, best_fit
from tests.data.packed_rows import documents_of, rows_of

EXAMPLES = 60 * int(os.environ.get("JLLM_TEST_SIZE", "1"))


lengths_lists = st.lists(st.integers(1, 25), min_size=1, max_size=30)


def textbook(lengths: list[int], room: int) -> list[list[int]]:
    """Best-fit decreasing as in a textbook: look at every bin."""
    bins: list[list[int]] = []
    left: list[int] = []
    changed: list[int] = []
    for clock, number in enumerate(sorted(range(len(lengths)), key=lambda i: -lengths[i])):
        fitting = [i for i in range(len(bins)) if left[i] >= lengths[number]]
        if fitting:
            chosen = min(fitting, key=lambda i: (left[i], changed[i]))
        else:
            chosen = len(bins)
            bins.append([])
            left.append(room)
            changed.append(0)
        bins[chosen].append(number)
        left[chosen] -= lengths[number]
        changed[chosen] = clock
    return bins


@settings(max_examples=2 * EXAMPLES, deadline=None)
@given(lengths=st.lists(st.integers(1, 64), max_size=60))
def test_best_fit_is_the_textbook(lengths: list[int]) -> None:
    bins = best_fit(lengths, 64)
    assert bins == textbook(lengths, 64)
    assert sorted(number for row in bins for number in row) == list(range(len(lengths)))
    assert all(sum(lengths[number] for number in row) <= 64 for row in bins)


@settings(max_examples=EXAMPLES, deadline=None)
@given(lengths=lengths_lists, length=st.integers(2, 20), pad=st.sampled_from([None, 4]))
def test_best_fit_rows(lengths: list[int], length: int, pad: int | None) -> None:
    documents = documents_of(lengths)
    packer = BestFitPacker(length, labels=False, pad_to=pad, pad_id=7)
    rows = rows_of(packer, documents, [3, 11])
    spans = []
    trained = 0
    for row in rows:
        bounds = row["cu_seqlens"]
        assert bounds == sorted(set(bounds))
        assert bounds[-1] <= length
        assert pad is None or len(row["input_ids"]) % pad == 0
        assert set(row["input_ids"][bounds[-1] :]) <= {7}
        spans += [row["input_ids"][a:b] for a, b in itertools.pairwise(bounds)]
        trained += sum(b - a - 1 for a, b in itertools.pairwise(bounds))
    whole = {tuple(documents.ids[a:b].tolist()) for a, b in itertools.pairwise(documents.offsets)}
    assert {span for span in whole if len(span) <= length} <= {tuple(span) for span in spans}
    assert trained == len(documents.ids) - len(lengths)
    batch = pa.RecordBatch.from_pylist(rows, schema=None)
    assert count_trained(_typed(batch)) == trained


def _typed(batch: pa.RecordBatch) -> pa.RecordBatch:
    from jllm.data.dataset.shards import schema

    wanted = schema(batch.schema.names)
    return pa.RecordBatch.from_arrays(
        [batch.column(name).cast(wanted.field(name).type) for name in wanted.names], schema=wanted
    )


@pytest.mark.parametrize("room", [1, 2, 4096])
def test_best_fit_of_nothing(room: int) -> None:
    assert best_fit([], room) == []
    assert len(best_fit([room] * 5, room)) == 5
