"""Token budgets, parts on nodes, and steps of epochs, against the plainest way to count them."""

import itertools
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jllm.train.data.batching import EpochSteps, Parts, TokenBudget, padded_length

EXAMPLES = max(20, int(200 * float(os.environ.get("JLLM_TEST_SIZE", "1"))))
LENGTHS = st.lists(st.integers(1, 500), max_size=40)
BUDGETS = st.builds(
    TokenBudget, tokens=st.integers(512, 2048), micro_batches=st.integers(1, 6), seq_len=st.sampled_from([None, 499])
)


def filled(budget: TokenBudget, lengths: np.ndarray) -> int:
    """What a micro-batch fills."""
    return len(lengths) * max(padded_length(int(length) - 1, budget.seq_len) for length in lengths)


@settings(max_examples=EXAMPLES, deadline=None)
@given(lengths=LENGTHS, budget=BUDGETS)
def test_groups_hold_every_row_once_within_the_budget(lengths: list[int], budget: TokenBudget) -> None:
    array = np.array(lengths, dtype=np.int32)
    groups = budget.groups(array)
    assert sorted(itertools.chain.from_iterable(group.tolist() for group in groups)) == list(range(len(lengths)))
    assert all(filled(budget, array[group]) <= budget.tokens for group in groups)
    longest = [int(array[group].max()) for group in groups]
    assert longest == sorted(longest, reverse=True)
    # The first row of a group did not fit into the one before.
    for group, after in itertools.pairwise(groups):
        assert filled(budget, array[np.append(group, after[0])]) > budget.tokens


@settings(max_examples=EXAMPLES, deadline=None)
@given(lengths=LENGTHS, budget=BUDGETS)
def test_a_step_has_all_rows_that_fit(lengths: list[int], budget: TokenBudget) -> None:
    array = np.array(lengths, dtype=np.int32)
    counts = [len(budget.groups(array[:count])) for count in range(1, len(lengths) + 1)]
    assert counts == sorted(counts)
    fits = [count for count, groups in enumerate(counts, start=1) if groups <= budget.micro_batches]
    assert budget.rows_of_step(array) == max(fits, default=0)


@settings(max_examples=EXAMPLES, deadline=None)
@given(lengths=LENGTHS, budget=BUDGETS)
def test_the_steps_of_an_epoch(lengths: list[int], budget: TokenBudget) -> None:
    array = np.array(lengths, dtype=np.int32)
    steps = at = 0
    while at < len(array):
        at += max(
            count
            for count in range(1, len(array) - at + 1)
            if len(budget.groups(array[at : at + count])) <= budget.micro_batches
        )
        steps += 1
    assert budget.count_steps(array) == steps


@settings(max_examples=EXAMPLES, deadline=None)
@given(parts=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 5)), min_size=1, max_size=4))
def test_parts_go_on_from_any_step(parts: list[tuple[int, int]]) -> None:
    division = Parts(rows=tuple(rows for rows, _ in parts), batch=tuple(batch for _, batch in parts))
    taken: tuple[int, ...] = (0,) * len(parts)
    steps = 0
    while sum(taken) < sum(division.rows):
        assert division.taken_after(sum(taken)) == taken
        taken = division.next(taken)
        steps += 1
    assert taken == division.rows
    assert steps == division.steps


def test_steps_are_found_in_their_epoch() -> None:
    epochs = EpochSteps(counts=(3, 2))
    assert [epochs.locate(step) for step in range(1, 10)] == [
        *((1, n, 3) for n in (1, 2, 3)),
        *((epoch, n, 2) for epoch in (2, 3, 4) for n in (1, 2)),
    ]
    assert [epochs.total(count) for count in range(5)] == [0, 3, 5, 7, 9]


@pytest.mark.parametrize(("inputs", "most", "length"), [(0, None, 64), (64, None, 64), (65, None, 128), (65, 100, 100)])
def test_padding(inputs: int, most: int | None, length: int) -> None:
    assert padded_length(inputs, most) == length


@pytest.mark.parametrize(("tokens", "micro_batches"), [(8192, 64), (16384, 64), (8192, 128)])
def test_little_is_padding_where_a_step_has_many_rows(tokens: int, micro_batches: int) -> None:
    """Rows of 64 to 2049 tokens, all lengths alike: below 5 %, where 8 rows in their order waste eight times that."""
    lengths = np.random.default_rng(0).integers(64, 2050, 30_000).astype(np.int32)
    budget = TokenBudget(tokens=tokens, micro_batches=micro_batches, seq_len=2048)
    shares, at = [], 0
    while at < len(lengths):
        rows = lengths[at : at + budget.rows_of_step(lengths[at : at + 8000])]
        slots = sum(filled(budget, rows[group]) for group in budget.groups(rows))
        shares.append(1 - int((rows - 1).sum()) / slots)
        at += len(rows)
    assert np.mean(shares) < 0.05
    in_order = lengths[: len(lengths) // 8 * 8].reshape(-1, 8)
    slots = sum(filled(budget, rows) for rows in in_order)
    assert 1 - int((in_order - 1).sum()) / slots > 8 * np.mean(shares)
