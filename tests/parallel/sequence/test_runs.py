"""Runs of a row's tokens: they cover it, and cost the same as nearly as tokens allow."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jllm.errors import UserError
from jllm.parallel.sequence.runs import TokenCost, balanced, even

COSTS = st.builds(
    TokenCost,
    apart=st.integers(0, 10**6),
    windows=st.lists(st.tuples(st.none() | st.integers(1, 10**5), st.integers(1, 90)), min_size=1, max_size=2).map(
        tuple
    ),
)


@given(
    length=st.integers(1, 300), apart=st.integers(0, 50), windows=st.lists(st.none() | st.integers(1, 40), min_size=1)
)
def test_costs_are_counts_of_keys(length: int, apart: int, windows: list[int | None]) -> None:
    cost = TokenCost(apart=apart, windows=tuple((window, 3) for window in windows))
    keys = sum(3 * min(place + 1, window or length) for place in range(length) for window in windows)
    assert cost.of_first(length) == keys + length * apart


@given(length=st.integers(1, 10**7), ranks=st.integers(1, 64), cost=COSTS)
def test_runs_cover_a_row_and_differ_by_a_token(length: int, ranks: int, cost: TokenCost) -> None:
    """A run's end is the nearest one to where the costs before it are its share."""
    if length < ranks:
        with pytest.raises(UserError, match=f"--sequence_parallel_size {ranks}: rows of {length} tokens"):
            balanced(length, ranks, cost)
        return
    for bounds in (even(length, ranks), balanced(length, ranks, cost)):
        assert (bounds[0], bounds[-1], len(bounds)) == (0, length, ranks + 1)
        assert all(end > start for start, end in itertools.pairwise(bounds))
    lengths = [end - start for start, end in itertools.pairwise(even(length, ranks))]
    assert max(lengths) - min(lengths) <= 1
    total, bounds = cost.of_first(length), balanced(length, ranks, cost)
    if length > 100 * ranks:  # nowhere does the least length of a run count
        for rank, bound in enumerate(bounds[1:-1], 1):
            exact = rank * total
            assert abs(cost.of_first(bound) * ranks - exact) <= abs(cost.of_first(bound + 1) * ranks - exact)
            assert abs(cost.of_first(bound) * ranks - exact) <= abs(cost.of_first(bound - 1) * ranks - exact)


@pytest.mark.parametrize("ranks", [2, 8, 16])
@pytest.mark.parametrize(("length", "most"), [(1000, 0.03), (8192, 0.003), (2**17, 0.0003), (2**20, 0.0001)])
def test_attention_alone_is_balanced(ranks: int, length: int, most: float) -> None:
    """The slowest run of a row has hardly more work than the mean; an even one of 8 has nearly twice as much."""
    cost = TokenCost()
    shares = cost.shares(balanced(length, ranks, cost))
    assert max(shares) * ranks - 1 <= most
    assert sum(shares) == pytest.approx(1)
    assert max(cost.shares(even(length, ranks))) * ranks == pytest.approx(2 - 1 / ranks, rel=0.01)
