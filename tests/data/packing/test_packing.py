"""Packing: rows are what their definitions say."""

import itertools
import os
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jllm.data.dataset.shards import IGNORE_INDEX, count_trained
from jllm.data.packing.best_fit import BestFitPacker, best_fit
from jllm.data.packing.conversations import ConversationPacker
from jllm.data.packing.packers import Documents, StackPacker, WindowPacker

EXAMPLES = 60 * int(os.environ.get("JLLM_TEST_SIZE", "1"))
lengths_lists = st.lists(st.integers(1, 25), min_size=1, max_size=30)


def documents_of(lengths: list[int], labels: bool = False) -> Documents:
    offsets = np.r_[0, np.cumsum(lengths)].astype(np.int64)
    ids = np.arange(offsets[-1], dtype=np.int32)
    return Documents(
        ids=ids, offsets=offsets, labels=np.where(ids % 3 > 0, ids, -100).astype(np.int32) if labels else None
    )


def rows_of(packer: Any, documents: Documents, cuts: list[int]) -> list[dict[str, list[int]]]:
    """Feed documents in pieces, taking the state out and in between them."""
    batches: list[pa.RecordBatch] = []
    places = sorted({0, len(documents), *(cut % (len(documents) + 1) for cut in cuts)})
    for begin, end in itertools.pairwise(places):
        state = packer.state()
        packer.restore({key: value.tolist() if hasattr(value, "tolist") else value for key, value in state.items()})
        batch = packer.feed(documents.slice(begin, end))
        batches += [batch] if batch is not None else []
    batches += list(packer.finish())
    return [row for batch in batches for row in batch.to_pylist()]


@settings(max_examples=EXAMPLES, deadline=None)
@given(lengths=lengths_lists, length=st.integers(2, 12), cuts=st.lists(st.integers(0, 40), max_size=4))
def test_stacked_rows(lengths: list[int], length: int, cuts: list[int]) -> None:
    documents = documents_of(lengths)
    stream, starts = documents.ids.tolist(), set(documents.offsets[:-1].tolist())
    wanted = []
    for begin in range(0, max(1, len(stream) - 1), length - 1):
        row = stream[begin : begin + length]
        inside = {start - begin for start in starts if begin <= start < begin + len(row)}
        wanted.append({"input_ids": row, "cu_seqlens": sorted({0, len(row)} | inside)})
    assert rows_of(StackPacker(length), documents, cuts) == wanted
    targets = sum(len(row["input_ids"]) - 1 - len(row["cu_seqlens"][1:-1]) for row in wanted)
    if len(stream) > 1:
        shared = sum(1 for row in wanted for x in row["cu_seqlens"][1:-1] if x == len(row["input_ids"]))
        assert targets + shared == len(stream) - len(lengths)
    full = rows_of(StackPacker(length, drop_tail=True), documents, cuts)
    assert full == [row for row in wanted if len(row["input_ids"]) == length]


@settings(max_examples=EXAMPLES, deadline=None)
@given(lengths=lengths_lists, length=st.integers(4, 12), cuts=st.lists(st.integers(0, 40), max_size=3))
def test_prefix_and_labels(lengths: list[int], length: int, cuts: list[int]) -> None:
    """With a prefix on every row and some ids masked, each other id but a document's first is trained on once."""
    documents = documents_of(lengths, labels=True)
    for packer in (
        StackPacker(length, labels=True, prefix=(900, 901)),
        WindowPacker(length, labels=True, prefix=(900, 901)),
    ):
        rows = rows_of(packer, documents, cuts)
        trained: list[int] = []
        for row in rows:
            assert row["input_ids"][:2] == [900, 901]
            assert row["labels"][:2] == [IGNORE_INDEX] * 2
            assert len(row["input_ids"]) <= length
            firsts = set(row.get("cu_seqlens", [0]))
            trained += [x for i, x in enumerate(row["labels"]) if x != IGNORE_INDEX and i not in firsts]
        first_ids = set(documents.offsets[:-1].tolist())
        assert documents.labels is not None
        wanted = [x for x in documents.labels.tolist() if x != IGNORE_INDEX and x not in first_ids]
        assert sorted(trained) == wanted


@settings(max_examples=EXAMPLES, deadline=None)
@given(lengths=lengths_lists, length=st.integers(2, 12), stride=st.integers(1, 11))
def test_windows(lengths: list[int], length: int, stride: int) -> None:
    stride = min(stride, length - 1)
    documents = documents_of(lengths)
    rows = [row["input_ids"] for row in rows_of(WindowPacker(length, stride=stride), documents, [])]
    wanted = []
    for i in range(len(lengths)):
        ids = documents.ids[documents.offsets[i] : documents.offsets[i + 1]].tolist()
        begin = 0
        while True:
            wanted.append(ids[begin : begin + length])
            if begin + length >= len(ids):
                break
            begin += stride
    assert rows == wanted


def test_half_stride_doubles_the_tokens() -> None:
    documents = documents_of([10_000])
    rows = rows_of(WindowPacker(100, stride=50), documents, [])
    assert abs(sum(len(row["input_ids"]) for row in rows) - 2 * 10_000) <= 100


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


def test_padding_and_filter() -> None:
    documents = documents_of([5, 1, 9], labels=True)
    rows = rows_of(ConversationPacker(16, pad_to=8, pad_id=3), documents, [])
    assert [len(row["input_ids"]) for row in rows] == [8, 8, 16]
    assert [row["cu_seqlens"] for row in rows] == [[0, 5], [0, 1], [0, 9]]
    assert all(
        row["labels"][row["cu_seqlens"][-1] :] == [IGNORE_INDEX] * (len(row["labels"]) - row["cu_seqlens"][-1])
        for row in rows
    )
    kept = rows_of(ConversationPacker(16, filter_rows=True), documents, [])
    assert [len(row["input_ids"]) for row in kept] == [5, 9]


@pytest.mark.parametrize("room", [1, 2, 4096])
def test_best_fit_of_nothing(room: int) -> None:
    assert best_fit([], room) == []
    assert len(best_fit([room] * 5, room)) == 5
