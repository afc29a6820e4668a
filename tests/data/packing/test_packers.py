"""Documents stacked and in windows: rows are what their definitions say."""

import os

from hypothesis import given, settings
from hypothesis import strategies as st

from jllm.data.dataset.shards import IGNORE_INDEX
from jllm.data.packing.packers import StackPacker, WindowPacker
from tests.data.packed_rows import documents_of, rows_of

EXAMPLES = 60 * int(os.environ.get("JLLM_TEST_SIZE", "1"))
lengths_lists = st.lists(st.integers(1, 25), min_size=1, max_size=30)


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
