"""Pieces of blocks: read as they lie there, whatever is taken of them."""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jllm.data.packing.documents import Documents
from jllm.data.packing.pieces import Pieces, Plan, windows
from tests.data.blocks import block_of

EXAMPLES = 60 * int(os.environ.get("JLLM_TEST_SIZE", "1"))


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    taken=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 39), st.integers(0, 9), st.integers(0, 9)), max_size=9),
    labels=st.booleans(),
)
def test_pieces_are_read_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, taken: list[tuple[int, int, int, int]], labels: bool
) -> None:
    folder = tmp_path_factory.mktemp("blocks")
    rng = np.random.default_rng(1)
    ids = [rng.integers(0, 100_000, 48).astype(np.int32) for _ in range(2)]
    marked = [np.where(rng.random(48) < 0.5, each, -100).astype(np.int32) for each in ids]
    offsets = np.array([0, 48])
    # One block may have no labels: all of its tokens are trained on.
    blocks = tuple(
        block_of(
            folder, Documents(ids=ids[number], offsets=offsets, labels=marked[number] if has else None), (0, number)
        )
        for number, has in enumerate((labels, False))
    )
    pieces = Pieces(
        starts=np.array([start for _, start, _, _ in taken], dtype=np.int64),
        sizes=np.array([size for _, _, size, _ in taken], dtype=np.int64),
        masked=np.array([min(size, hidden) for _, _, size, hidden in taken], dtype=np.int64),
    )
    of_block = np.array([block for block, *_ in taken], dtype=np.int64)
    found = Plan(blocks=blocks, of_block=of_block, pieces=pieces, lengths=pieces.sizes).documents()
    assert found.lengths.tolist() == pieces.sizes.tolist()
    for number, (block, start, size, hidden) in enumerate(taken):
        at = slice(*found.offsets[number : number + 2])
        assert found.ids[at].tolist() == ids[block][start : start + size].tolist()
        assert (found.labels is not None) == labels
        if found.labels is not None:
            wanted = (ids if block else marked)[block][start : start + size].copy()
            wanted[:hidden] = -100
            assert found.labels[at].tolist() == wanted.tolist()


@settings(max_examples=EXAMPLES, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), max_size=8), data=st.data())
def test_pieces_of_some_documents(lengths: list[int], data: st.DataObject) -> None:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    documents = Documents(ids=np.arange(offsets[-1], dtype=np.int32), offsets=offsets)
    pieces = windows(documents, 7, 5)
    chosen = np.array(data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths))), dtype=bool)
    begin, end = sorted(data.draw(st.tuples(*[st.integers(0, len(lengths))] * 2)))
    for found, numbers in (
        (pieces.take(chosen), np.flatnonzero(chosen)),
        (pieces.of_documents(begin, end), np.arange(begin, end)),
    ):
        assert found.documents == len(numbers)
        wanted = windows(documents.take(numbers), 7, 5)
        assert found.sizes.tolist() == wanted.sizes.tolist()
        first = np.repeat(offsets[:-1][numbers], wanted.counts)
        own = np.repeat(documents.take(numbers).offsets[:-1], wanted.counts)
        assert found.starts.tolist() == (wanted.starts - own + first).tolist()


def test_a_block_that_was_cut_short_is_noticed(tmp_path: object, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("blocks")
    documents = Documents(ids=np.arange(1000, dtype=np.int32), offsets=np.array([0, 1000]))
    block = block_of(folder, documents, (0, 0))
    with open(block.path, "r+b") as file:
        file.truncate(block.ids + 100)
    pieces = windows(documents, 1000, 999)
    plan = Plan(blocks=(block,), of_block=np.zeros(1, np.int64), pieces=pieces, lengths=pieces.sizes)
    with pytest.raises(EOFError, match="shorter"):
        plan.documents()
