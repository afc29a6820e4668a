"""Conversations to rows: padding, what is dropped, and how long ones are cut."""

import os

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jllm.data.dataset.shards import IGNORE_INDEX
from jllm.data.packing.conversations import ConversationPacker, continued_rows, joined, split_long
from tests.data.packed_rows import documents_of, rows_of


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


EXAMPLES = 25 * int(os.environ.get("JLLM_TEST_SIZE", "1"))


@settings(max_examples=4 * EXAMPLES, deadline=None)
@given(
    turns=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 60)), min_size=1, max_size=8),
    length=st.integers(2, 50),
)
def test_long_conversations_train_each_answer_token_once(turns: list[tuple[int, int]], length: int) -> None:
    trained = np.concatenate([np.r_[np.zeros(asked, bool), np.ones(said, bool)] for asked, said in turns])
    ids = np.arange(len(trained), dtype=np.int32)
    labels = np.where(trained, ids, np.int32(IGNORE_INDEX))
    rows = split_long(joined([ids], [labels]), length)
    assert rows.labels is not None
    assert rows.lengths.max() <= length
    seen = rows.labels[rows.labels != IGNORE_INDEX]
    assert np.array_equal(np.sort(seen), np.flatnonzero(trained))
    firsts = rows.offsets[:-1]
    assert np.all(rows.labels[firsts] == IGNORE_INDEX), "a row's first token has nothing to be predicted from"
    for begin, end, trainable in continued_rows(labels, length)[1:] if len(ids) > length else ():
        first = int(np.flatnonzero(trained[trainable:end])[0]) + trainable
        assert first - begin == min(first, max(1, length // 2))
