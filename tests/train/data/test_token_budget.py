"""Micro-batches by tokens, window by window: every row once from any cursor, joined or not, as full as can be had."""

import collections
import dataclasses
import hashlib
import itertools
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jllm.data.dataset.manifest import open_data_set
from jllm.data.dataset.shards import IGNORE_INDEX
from jllm.errors import UserError
from jllm.models.pipeline.bundle import LABELS, POSITION_IDS
from jllm.train.data import batching
from jllm.train.data.batching import NEWEST_RULE, TokenBudget, padded_length
from jllm.train.data.loader import BatchShare, Cursor, Step, train_steps
from jllm.train.data.rows import Row, ShardIndex, joined, read_rows, row_lengths
from tests.fixtures import VOCABULARY, random_rows, write_rows

EXAMPLES = max(20, int(100 * float(os.environ.get("JLLM_TEST_SIZE", "1"))))
ROWS = 90
SHARE = BatchShare(
    micro_batch=1, accumulation=2, data_rank=0, data_size=1, seq_len=None, block_mask=False, vocab_size=VOCABULARY
)


@pytest.fixture(scope="module")
def index() -> Iterator[ShardIndex]:
    """Rows of 2 to 300 tokens, padded ones among them, in windows of a few micro-batches."""
    rows = random_rows(ROWS, longest=300, labels=True, packed=True)
    for row in rows[::7]:
        row["input_ids"] = [*row["input_ids"], 0, 0, 0]
        row["labels"] = [*row["labels"], *[IGNORE_INDEX] * 3]
    assert TokenBudget(tokens=1536, micro_batches=1, seq_len=None, rule=2).window_rows(700.5) == 140
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(batching, "WINDOW_MICRO_BATCHES", 20)
        yield ShardIndex(open_data_set(write_rows(Path(folder) / "set", rows, files=3)))


def share_with(
    tokens: int, *, joins: bool, accumulation: int = 2, data_size: int = 1, data_rank: int = 0
) -> BatchShare:
    budget = TokenBudget(
        tokens=tokens, micro_batches=accumulation * data_size, seq_len=None, rule=NEWEST_RULE, joins=joins
    )
    return dataclasses.replace(
        SHARE,
        accumulation=accumulation,
        data_size=data_size,
        data_rank=data_rank,
        block_mask=joins,
        budget=budget,
    )


def epoch_of(index: ShardIndex, share: BatchShare, cursor: Cursor = Cursor(), *, shuffle: bool = True) -> list[Step]:  # noqa: B008
    """The steps from a cursor to the end of its epoch."""
    steps = train_steps(index, share, seed=3, shuffle=shuffle, cursor=cursor, ahead=False)
    return list(itertools.takewhile(lambda step: step.start.epoch == cursor.epoch, steps))


Document = tuple[tuple[int, ...], tuple[int, ...]]


def documents(steps: list[Step]) -> "collections.Counter[Document]":
    """Inputs and targets of every document that has a target, without the inputs behind its last target."""
    found: collections.Counter[Document] = collections.Counter()
    for step in steps:
        for batch in step.micro_batches:
            planes = (batch.input_ids, batch.planes[LABELS], batch.planes[POSITION_IDS])
            for ids, targets, positions in zip(*(plane.tolist() for plane in planes), strict=True):
                starts = [place for place, position in enumerate(positions) if position == 0]
                for start, end in itertools.pairwise([*starts, len(ids)]):
                    last = max((k for k in range(start, end) if targets[k] != IGNORE_INDEX), default=start - 1) + 1
                    if last > start:
                        found[tuple(ids[start:last]), tuple(targets[start:last])] += 1
    return found


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 500), max_size=60),
    tokens=st.integers(512, 2048),
    seq_len=st.sampled_from([None, 499]),
    joins=st.booleans(),
    seed=st.sampled_from([None, 0, 1]),
)
def test_a_window_holds_every_row_once_within_the_budget(
    lengths: list[int], tokens: int, seq_len: int | None, joins: bool, seed: int | None
) -> None:
    budget = TokenBudget(tokens=tokens, micro_batches=1, seq_len=seq_len, rule=2, joins=joins)
    array = np.array(lengths, dtype=np.int32)
    drawn = None if seed is None else np.random.default_rng(seed)
    found = budget.micro_batches_of_window(array, drawn)
    rows = [row for micro_batch in found for row in micro_batch]
    assert sorted(itertools.chain.from_iterable(rows)) == list(range(len(lengths)))
    assert joins or all(len(row) == 1 for row in rows)
    for micro_batch in found:
        inputs = [max(int(array[row].sum()) - 1, 0) for row in micro_batch]
        assert len(micro_batch) * max(padded_length(each, seq_len) for each in inputs) <= tokens
        assert seq_len is None or max(inputs) <= seq_len


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    tokens=st.sampled_from([320, 448, 1024, 5000]),
    joins=st.booleans(),
    accumulation=st.integers(1, 4),
    data_size=st.integers(1, 3),
    shuffle=st.booleans(),
    at=st.integers(0, 100),
)
def test_every_row_once_from_any_cursor(
    index: ShardIndex, tokens: int, joins: bool, accumulation: int, data_size: int, shuffle: bool, at: int
) -> None:
    shares = [
        share_with(tokens, joins=joins, accumulation=accumulation, data_size=data_size, data_rank=rank)
        for rank in range(data_size)
    ]
    whole = [epoch_of(index, share, shuffle=shuffle) for share in shares]
    plain = dataclasses.replace(SHARE, accumulation=1, block_mask=joins)
    assert documents([step for steps in whole for step in steps]) == documents(epoch_of(index, plain))
    assert {tuple(step.rows for step in steps) for steps in whole} == {tuple(step.rows for step in whole[0])}
    assert sum(step.rows for step in whole[0]) == ROWS
    assert all(len(step.micro_batches) == accumulation for steps in whole for step in steps)
    order = index.order(seed=3, epoch=0, shuffle=shuffle)
    budget = shares[0].budget
    assert budget is not None
    surveyed = budget.survey(row_lengths(index, order), window=budget.window_rows(index.mean_length))
    assert surveyed.steps == len(whole[0])
    start = whole[0][at % len(whole[0])].start
    for share, steps in zip(shares, whole, strict=True):
        rest = epoch_of(index, share, start, shuffle=shuffle)
        for one, other in zip(steps[at % len(steps) :], rest, strict=True):
            assert one.start == other.start
            for mine, again in zip(one.micro_batches, other.micro_batches, strict=True):
                assert mine.input_ids.equal(again.input_ids)
                assert mine.planes.stacked.equal(again.planes.stacked)
    counts = {(step.tokens, step.trained_tokens) for steps in whole for step in steps}
    assert all(tokens >= trained for tokens, trained in counts)


@settings(max_examples=EXAMPLES, deadline=None)
@given(cut=st.integers(0, ROWS), joins=st.booleans())
def test_a_cursor_within_a_micro_batch_loses_no_row(index: ShardIndex, cut: int, joins: bool) -> None:
    """As after --force_resume with another budget."""
    steps = epoch_of(index, share_with(1024, joins=joins), Cursor(epoch=0, rows=cut)) if cut < ROWS else []
    assert sum(step.rows for step in steps) == ROWS - cut


def test_the_division_among_pipelines_changes_no_micro_batch(index: ShardIndex) -> None:
    """A run that goes on with twice the pipelines and half the accumulation makes the same steps."""
    for joins in (False, True):
        [alone] = [epoch_of(index, share_with(1024, joins=joins, accumulation=4))]
        pair = [
            epoch_of(index, share_with(1024, joins=joins, accumulation=2, data_size=2, data_rank=rank))
            for rank in (0, 1)
        ]
        for step, *halves in zip(alone, *pair, strict=True):
            assert step.tokens == sum(half.tokens for half in halves)
            assert documents([step]) == documents(halves)


@pytest.mark.parametrize("joins", [False, True])
def test_the_first_step_is_the_largest(index: ShardIndex, joins: bool) -> None:
    longest = max(len(row.ids) for row in read_rows(index, index.order(seed=3, epoch=0, shuffle=True), 0, ahead=False))
    plain = share_with(1024, joins=joins)
    as_they_are, steps = epoch_of(index, plain), epoch_of(index, dataclasses.replace(plain, longest=longest - 1))
    assert documents(steps[:1]) == documents(as_they_are[:1])
    assert steps[0].trained_tokens == as_they_are[0].trained_tokens
    sizes = [[batch.input_ids.numel() for batch in step.micro_batches] for step in steps]
    assert max(map(max, sizes)) == max(sizes[0]) <= 1024
    assert steps[0].length == max(step.length for step in steps)
    assert {step.room for step in steps} == {2 * 1024}
    if joins:  # also micro-batches of what was left over of a window, and those that fill up the step
        whole = dataclasses.replace(share_with(1024, joins=True, accumulation=60), longest=longest - 1)
        [step] = epoch_of(index, whole)
        assert {batch.input_ids.numel() for batch in step.micro_batches} == {1024}


def test_rows_that_are_joined_keep_their_documents() -> None:
    def array(*numbers: int) -> "np.ndarray":
        return np.array(numbers, dtype=np.int32)

    one = Row(ids=array(5, 6, 7, 8, 0, 0), labels=array(5, -100, 7, 8, 0, 0), boundaries=array(0, 2, 4))
    found = joined([one, Row(ids=array(9, 10), labels=None, boundaries=None), Row(array(3), None, array(0, 1))])
    assert found.ids.tolist() == [5, 6, 7, 8, 0, 0, 9, 10, 3]
    assert found.labels is not None
    assert found.labels.tolist() == [5, -100, 7, 8, -100, -100, 9, 10, 3]
    assert found.boundaries is not None
    assert found.boundaries.tolist() == [0, 2, 4, 6, 8, 9]
    assert joined([one]) is one


def test_a_row_beyond_the_budget_is_named(index: ShardIndex) -> None:
    for joins in (False, True):
        with pytest.raises(UserError, match=r"parquet: row group \d+, row \d+: --batch_size_tokens 128: a row has \d+"):
            epoch_of(index, share_with(128, joins=joins))


@pytest.mark.parametrize("micro_batches", [1, 2, 8])
def test_micro_batches_are_full(micro_batches: int) -> None:
    """Lengths of 1 to 2,000 in micro-batches of 2,048 tokens. Half of the rows leave no room for another one."""
    lengths = np.random.default_rng(0).integers(1, 2001, 4000).astype(np.int32)
    found = []
    for rule, joins in ((1, False), (2, False), (2, True)):
        budget = TokenBudget(tokens=2048, micro_batches=micro_batches, seq_len=None, rule=rule, joins=joins)
        found.append(budget.survey(lengths, window=131))
    before, windows, joining = found
    assert before.filled < 0.7 < windows.filled
    assert joining.filled > 0.93
    assert max(windows.half_empty, joining.half_empty) < 0.02 < 0.05 < before.half_empty
    assert joining.steps < windows.steps < before.steps


def test_rules_stay_as_they_are() -> None:
    """A run goes on by the rule of its checkpoint: these are its micro-batches, for ever."""
    lengths = np.random.default_rng(1).integers(2, 1500, 300).astype(np.int32)
    made = []
    for rule, joins in ((1, False), (2, False), (2, True)):
        budget = TokenBudget(tokens=1536, micro_batches=4, seq_len=None, rule=rule, joins=joins)
        if rule == 1:
            content = [[group.tolist() for group in budget.groups(lengths)], budget.rows_of_step(lengths)]
        else:
            window = 64 * 1536 // 700
            content = [budget.micro_batches_of_window(lengths[:window], np.random.default_rng(2))]
        made.append(hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12])
    assert made == ["4e42ca5eed44", "626b76a625ad", "7965f66bba76"]
