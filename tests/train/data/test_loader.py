"""The training stream: the same rows from any cursor and however a batch is divided, each collated exactly."""

import dataclasses
import itertools
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jllm.data.dataset import files
from jllm.data.dataset.manifest import open_data_set
from jllm.errors import UserError
from jllm.models.pipeline.bundle import LABELS
from jllm.train.data import rows as rows_module
from jllm.train.data.batching import TokenBudget, padded_length
from jllm.train.data.loader import (
    BatchShare,
    Cursor,
    ReadAhead,
    Step,
    eval_micro_batches,
    eval_steps,
    train_steps,
)
from jllm.train.data.rows import Row, ShardIndex, read_rows
from tests.fixtures import VOCABULARY, random_rows, write_rows

SIZE = float(os.environ.get("JLLM_TEST_SIZE", "1"))
EXAMPLES = max(10, int(50 * SIZE))
ROWS = 61
SHARE = BatchShare(
    micro_batch=2, accumulation=2, data_rank=0, data_size=1, seq_len=None, block_mask=False, vocab_size=VOCABULARY
)


@pytest.fixture(scope="module")
def index() -> Iterator[ShardIndex]:
    """61 rows in 3 files, row groups of a few rows, windows of a few row groups; row i starts with the token i."""
    rows = random_rows(ROWS, longest=20, labels=True, packed=True)
    for number, row in enumerate(rows):
        row["input_ids"][0] = number
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(files, "ROW_GROUP_TOKENS", 64)
        patch.setattr(rows_module, "WINDOW_BYTES", 2000)
        index = ShardIndex(open_data_set(write_rows(Path(folder) / "set", rows, files=3)))
        assert len(index.rows) > 8
        assert index.order(seed=0, epoch=0, shuffle=True).num_windows > 3
        yield index


def numbers(step: Step) -> list[int]:
    """The rows of a step by their first token, in order; -1 for a filling row, which is fully masked."""
    found = []
    for batch in step.micro_batches:
        for ids, targets in zip(batch.input_ids.tolist(), batch.planes[LABELS].tolist(), strict=True):
            filling = not any(ids)
            assert not filling or set(targets) == {-100}
            found.append(-1 if filling and set(targets) == {-100} and ids[0] == 0 else ids[0])
    return found


def take(index: ShardIndex, share: BatchShare, count: int, cursor: Cursor = Cursor(), **more: Any) -> list[Step]:  # noqa: B008
    given = {"seed": 5, "shuffle": True, "ahead": True, **more}
    return list(itertools.islice(train_steps(index, share, cursor=cursor, **given), count))


def real(step: Step) -> list[int]:
    return [number for number in numbers(step) if number >= 0]


def same(one: Step, other: Step) -> bool:
    """Whether two steps are the same to the last bit."""
    if dataclasses.replace(one, micro_batches=[]) != dataclasses.replace(other, micro_batches=[]):
        return False
    pairs = zip(one.micro_batches, other.micro_batches, strict=True)
    return all(a.input_ids.equal(b.input_ids) and a.planes.stacked.equal(b.planes.stacked) for a, b in pairs)


def test_every_epoch_has_every_row_once_and_its_own_order(index: ShardIndex) -> None:
    steps = take(index, SHARE, 48)
    epochs = [[row for step in steps if step.start.epoch == epoch for row in real(step)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(ROWS)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [step.rows for step in steps] == ([4] * 15 + [1]) * 3
    assert numbers(steps[15])[1:] == [-1, -1, -1]


def test_no_shuf_reads_the_files_in_order(index: ShardIndex) -> None:
    steps = take(index, SHARE, 32, shuffle=False)
    assert [row for step in steps for row in real(step)] == 2 * list(range(ROWS))


@settings(max_examples=EXAMPLES, deadline=None)
@given(at=st.integers(0, 35), seed=st.integers(0, 3), shuffle=st.booleans(), ahead=st.booleans())
def test_goes_on_from_any_cursor(index: ShardIndex, at: int, seed: int, shuffle: bool, ahead: bool) -> None:
    whole = take(index, SHARE, 36, seed=seed, shuffle=shuffle)
    rest = take(
        index, SHARE, 36 - at, whole[at].start if at < 36 else Cursor(), seed=seed, shuffle=shuffle, ahead=ahead
    )
    assert all(same(one, other) for one, other in zip(whole[at:], rest, strict=True))


def mixed(folder: Path) -> ShardIndex:
    """Rows of 2 to 400 tokens; the longest is far from the beginning of any order."""
    return ShardIndex(open_data_set(write_rows(folder / "mixed", random_rows(200, longest=400), files=3)))


def shapes(step: Step) -> list[tuple[int, int]]:
    return [tuple(batch.input_ids.shape) for batch in step.micro_batches]


def tokens_of(step: Step) -> list[tuple[list[int], list[int]]]:
    """Inputs and targets of every row that is not all padding, without what is masked behind them."""
    found = []
    for batch in step.micro_batches:
        for ids, targets in zip(batch.input_ids.tolist(), batch.planes[LABELS].tolist(), strict=True):
            if any(ids):
                end = max(place for place, token in enumerate(ids) if token) + 1
                assert set(targets[end:]) <= {-100}
                found.append((ids[:end], targets[:end]))
    return found


@pytest.mark.parametrize("data_size", [1, 2])
def test_the_first_step_is_the_largest(tmp_path: Path, data_size: int) -> None:
    """Memory that does not suffice fails there. The rows are those that the step has anyway, in every pipeline."""
    index = mixed(tmp_path)
    longest = max(len(row.ids) for row in read_rows(index, index.order(seed=5, epoch=0, shuffle=True), 0, ahead=False))
    budget = TokenBudget(tokens=1024, micro_batches=3 * data_size, seq_len=None)
    for rank, chosen in itertools.product(range(data_size), (None, budget)):
        plain = dataclasses.replace(SHARE, accumulation=3, data_rank=rank, data_size=data_size, budget=chosen)
        share = dataclasses.replace(plain, longest=longest - 1)
        steps, as_they_are = take(index, share, 30), take(index, plain, 30)
        first, *others = steps
        assert first.length == padded_length(longest - 1, None) == max(step.length for step in steps)
        assert all(same(one, other) for one, other in zip(others, as_they_are[1:], strict=True))
        slots = [[rows * length for rows, length in shapes(step)] for step in steps]
        if chosen is None:
            assert max(map(max, slots)) == max(slots[0])
        else:
            # As much as whole rows can fill of the budget, in every micro-batch.
            assert min(slots[0]) > budget.tokens - first.length
            assert sum(slots[0]) > 0.9 * max(map(sum, slots))
        [resumed] = take(index, share, 1, others[0].start)
        assert same(resumed, others[0])


@settings(max_examples=4 * EXAMPLES, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 300), min_size=1, max_size=12),
    seq_len=st.sampled_from([None, 100, 256, 299]),
    longest=st.integers(0, 320),
    budget=st.sampled_from([None, 320, 600, 1024]),
)
def test_the_first_step_has_its_own_rows(
    lengths: list[int], seq_len: int | None, longest: int, budget: int | None
) -> None:
    """Whatever it is padded to: also where the manifest is wrong about the longest row."""
    most = 300 if seq_len is None else seq_len + 1
    rows = [
        Row(ids=np.arange(1, min(length, most) + 1, dtype=np.int32), labels=None, boundaries=None) for length in lengths
    ]
    chosen = None if budget is None else TokenBudget(tokens=budget, micro_batches=4, seq_len=seq_len)
    plain = dataclasses.replace(SHARE, vocab_size=1000, micro_batch=3, accumulation=4, seq_len=seq_len, budget=chosen)
    batch = next(plain.batches(iter(rows)))
    as_it_is = plain.step_of(batch, Cursor())
    first = dataclasses.replace(plain, longest=longest).step_of(batch, Cursor())
    assert tokens_of(first) == tokens_of(as_it_is)
    assert (first.rows, first.tokens, first.trained_tokens) == (as_it_is.rows, as_it_is.tokens, as_it_is.trained_tokens)
    assert first.length >= as_it_is.length
    longest_shape = padded_length(longest, seq_len)
    if budget is None:
        assert first.length == max(as_it_is.length, longest_shape)
    else:
        assert all(count * length <= budget for count, length in shapes(first))
        if min(count for count, _ in shapes(as_it_is)) * longest_shape <= budget:
            assert first.length >= longest_shape


def test_goes_on_from_the_very_end_of_an_epoch(index: ShardIndex) -> None:
    whole = take(index, SHARE, 20)
    assert same(take(index, SHARE, 1, Cursor(epoch=0, rows=ROWS))[0], whole[16])


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    divided=st.sampled_from([(1, 12, 1), (12, 1, 1), (3, 2, 2), (2, 2, 3), (1, 1, 12), (4, 3, 1)]), at=st.integers(0, 9)
)
def test_the_division_of_a_batch_changes_nothing(index: ShardIndex, divided: tuple[int, int, int], at: int) -> None:
    """The union over the data ranks is the global batch, in its order, with the same length and token counts."""
    micro_batch, accumulation, data_size = divided
    reference = take(index, dataclasses.replace(SHARE, micro_batch=2, accumulation=6), 10)[at]
    shares = [
        dataclasses.replace(
            SHARE, micro_batch=micro_batch, accumulation=accumulation, data_size=data_size, data_rank=data_rank
        )
        for data_rank in range(data_size)
    ]
    steps = [take(index, share, 1, reference.start)[0] for share in shares]
    assert [row for step in steps for row in numbers(step)] == numbers(reference)
    assert sum(step.tokens for step in steps) == reference.tokens
    assert sum(step.trained_tokens for step in steps) == reference.trained_tokens
    assert {(step.rows, step.length, step.start) for step in steps} == {
        (reference.rows, reference.length, reference.start)
    }
    for step in steps:
        assert len(step.micro_batches) == accumulation
        assert {tuple(batch.input_ids.shape) for batch in step.micro_batches} == {(micro_batch, step.length)}
        assert all(
            batch.planes.stacked.is_contiguous() and batch.input_ids.is_contiguous() for batch in step.micro_batches
        )


@pytest.mark.parametrize("accumulation", [1, 3, 40])
@pytest.mark.parametrize("data_size", [1, 2])
def test_evaluation_covers_every_row_once(index: ShardIndex, accumulation: int, data_size: int) -> None:
    found: list[list[int]] = []
    for data_rank in range(data_size):
        share = dataclasses.replace(SHARE, accumulation=accumulation, data_rank=data_rank, data_size=data_size)
        steps = list(eval_steps(index, share))
        assert [len(step.micro_batches) for step in steps] == eval_micro_batches(ROWS, share)
        found.extend(numbers(step) for step in steps)
    rows = [row for step in found for row in step]
    assert sorted(row for row in rows if row >= 0) == list(range(ROWS))
    assert rows.count(-1) < 2 * data_size


def test_mistakes_name_what_is_wrong(index: ShardIndex) -> None:
    with pytest.raises(UserError, match=r"--seq_len 9: a row has \d+ tokens"):
        take(index, dataclasses.replace(SHARE, seq_len=9), 16)
    with pytest.raises(UserError, match=r"token id \d\d in the data: the model has ids from 0 to 49"):
        take(index, dataclasses.replace(SHARE, vocab_size=50), 16)
    row = Row(ids=np.array([3, -7, 4], np.int32), labels=None, boundaries=None)
    with pytest.raises(UserError, match="token id -7 in the data"):
        SHARE.step_of([row], Cursor())


def test_seq_len_caps_the_padding_and_lengths_are_rounded(index: ShardIndex) -> None:
    assert {step.length for step in take(index, SHARE, 10)} == {64}
    assert {step.length for step in take(index, dataclasses.replace(SHARE, seq_len=19), 10)} == {19}


def test_read_ahead_hands_an_error_over_at_its_place() -> None:
    def items() -> Iterator[int]:
        yield from range(5)
        raise UserError("the sixth")

    ahead = ReadAhead(items())
    assert [next(ahead) for _ in range(5)] == list(range(5))
    with pytest.raises(UserError, match="the sixth"):
        next(ahead)
    with pytest.raises(UserError, match="the sixth"):
        next(ahead)
    assert list(ReadAhead(iter(range(7)))) == list(range(7))


def test_read_ahead_stays_within_its_depth_and_closes() -> None:
    made = []
    ahead = ReadAhead((made.append(i) or i for i in itertools.count()), depth=3)  # type: ignore[func-returns-value]
    assert next(ahead) == 0
    time.sleep(0.3)
    assert len(made) <= 6
    ahead.close()
    assert not any(thread.name == "read-ahead" for thread in threading.enumerate())


def test_a_damaged_row_group_is_named_where_it_is_reached(tmp_path: Path) -> None:
    folder = write_rows(tmp_path / "set", [{"input_ids": [i % VOCABULARY] * 9} for i in range(40)], files=2)
    index = ShardIndex(open_data_set(folder))
    damaged = open_data_set(folder).paths[1]
    content = bytearray(damaged.read_bytes())
    content[60:75] = bytes(15)
    damaged.write_bytes(content)
    steps = train_steps(index, SHARE, seed=0, shuffle=False, cursor=Cursor(epoch=0, rows=0), ahead=False)
    with pytest.raises(UserError, match=f"{damaged.name}: row group 0 is damaged"):
        list(itertools.islice(steps, 10))
