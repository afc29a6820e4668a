"""Rows that are planned by one process and made by another are those that a packer makes in one go."""

import itertools
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jllm.data.packing.best_fit import BestFitPacker
from jllm.data.packing.classes import ClassPacker
from jllm.data.packing.conversations import ConversationPacker
from jllm.data.packing.documents import Documents
from jllm.data.packing.packers import Packer, StackPacker, WindowPacker
from tests.data.blocks import block_of, planned_rows

EXAMPLES = 60 * int(os.environ.get("JLLM_TEST_SIZE", "1"))
PACKERS = {
    "stack": lambda: StackPacker(5),
    "stack, labels": lambda: StackPacker(5, labels=True),
    "stack, prefix": lambda: StackPacker(7, prefix=(1, 2), drop_tail=True),
    "windows": lambda: WindowPacker(5, stride=3, labels=True),
    "windows, prefix": lambda: WindowPacker(6, prefix=(1,), drop_tail=True),
    "conversations": lambda: ConversationPacker(6),
    "conversations, padded": lambda: ConversationPacker(6, pad_to=4, pad_id=9, filter_rows=True),
    "best fit": lambda: BestFitPacker(6, labels=False),
    "best fit of conversations": lambda: BestFitPacker(6, labels=True, pad_to=4, conversations=True),
    "classes": lambda: ClassPacker(StackPacker(5), StackPacker(5), labels=False),
    "classes of conversations": lambda: ClassPacker(
        BestFitPacker(6, labels=True, conversations=True),
        BestFitPacker(6, labels=True, conversations=True),
        labels=True,
    ),
}


def documents_of(lengths: list[int], seed: int, *, classes: bool) -> Documents:
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = rng.integers(10, 90_000, int(offsets[-1])).astype(np.int32)
    return Documents(
        ids=ids,
        offsets=offsets,
        labels=np.where(rng.random(len(ids)) < 0.5, ids, -100).astype(np.int32),
        classes=rng.integers(-1, 2, len(lengths)).astype(np.int8) if classes else None,
    )


@pytest.mark.parametrize("kind", PACKERS)
@settings(max_examples=EXAMPLES, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 20), max_size=14),
    parts=st.lists(st.integers(0, 14), max_size=4),
    cuts=st.lists(st.integers(0, 40), max_size=3),
    seed=st.integers(0, 1 << 20),
)
def test_planned_rows_are_those_of_the_packer(
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    lengths: list[int],
    parts: list[int],
    cuts: list[int],
    seed: int,
) -> None:
    if kind.startswith(("conv", "best", "classes of")):
        lengths = [max(1, length) for length in lengths]
    documents = documents_of(lengths, seed, classes="classes" in kind)
    places = sorted({0, len(documents), *(part % (len(documents) + 1) for part in parts)})
    given_ = [_copied(documents.slice(begin, end)) for begin, end in itertools.pairwise(places)]
    packer: Packer = PACKERS[kind]()
    wanted = [packer.feed(part) for part in given_]
    wanted += packer.finish()
    rows = [row for batch in wanted if batch is not None for row in batch.to_pylist()]
    assert planned_rows(tmp_path_factory.mktemp("blocks"), PACKERS[kind](), given_, cuts) == rows


def _copied(documents: Documents) -> Documents:
    return Documents(
        ids=documents.ids.copy(), offsets=documents.offsets, labels=documents.labels, classes=documents.classes
    )


@settings(max_examples=EXAMPLES, deadline=None)
@given(lengths=st.lists(st.integers(0, 20), min_size=1, max_size=14), row=st.integers(0, 40), seed=st.integers(0, 99))
def test_a_stream_is_gone_on_with_from_the_mark_before_a_row(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], row: int, seed: int
) -> None:
    """All documents before the mark can be forgotten."""
    folder = tmp_path_factory.mktemp("blocks")
    packer = StackPacker(5)
    parts = [documents_of([length], seed + number, classes=False) for number, length in enumerate(lengths)]
    blocks = [block_of(folder, part, (0, number)) for number, part in enumerate(parts)]
    planner = packer.planner()
    rows, known = [], None
    for number, part in enumerate(parts):
        plan = planner.feed(blocks[number], packer.pieces(part), number)
        before = len(rows)
        rows += packer.rows(plan, plan.documents()).to_pylist() if plan is not None else []
        if known is None and before < row <= len(rows):
            known = planner.before(row)
    rows += [each for plan in planner.finish() for each in packer.rows(plan, plan.documents()).to_pylist()]
    if known is None:
        return
    mark, state, first = known
    assert first <= row
    again = packer.planner()
    again.restore(state)
    found = []
    for number in range(mark, len(parts)):
        plan = again.feed(blocks[number], packer.pieces(parts[number]), number)
        found += packer.rows(plan, plan.documents()).to_pylist() if plan is not None else []
    found += [each for plan in again.finish() for each in packer.rows(plan, plan.documents()).to_pylist()]
    assert found == rows[first:]


@pytest.mark.parametrize("state", [{}, {"tokens": -1}, {"tokens": "3"}, {"tokens": 1.5}, {"ids": [1]}])
def test_a_state_that_no_run_left_is_refused(state: dict[str, object]) -> None:
    with pytest.raises((KeyError, ValueError)):
        StackPacker(5).planner().restore(state)
