"""Positions are a uniform permutation; buckets and units cover every block once."""

import os

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jllm.data.shuffle.layout import block_edges, destinations, lay_out

SIZE = float(os.environ.get("JLLM_TEST_SIZE", "1"))


@given(rows=st.integers(0, 5000), seed=st.integers(0, 2**64))
@settings(max_examples=int(100 * SIZE), deadline=None)
def test_destinations_are_a_permutation(rows: int, seed: int) -> None:
    to = destinations(rows, fingerprint="ab" * 32, seed=seed)
    assert np.array_equal(np.sort(to), np.arange(rows))


def test_every_position_is_equally_likely() -> None:
    """Chi-square over 200 seeds, for the position of every row: 8 × 8 cells, 200/8 expected in each."""
    rows, seeds = 8, 200
    counts = np.zeros((rows, rows))
    for seed in range(seeds):
        counts[np.arange(rows), destinations(rows, fingerprint="cd" * 32, seed=seed)] += 1
    expected = seeds / rows
    statistic = ((counts - expected) ** 2 / expected).sum()
    # (rows - 1)^2 = 49 degrees of freedom: mean 49, standard deviation 9.9; five of them each way.
    assert 49 - 5 * 9.9 < statistic < 49 + 5 * 9.9


@given(rows=st.integers(0, 400), blocks=st.integers(1, 20), rows_per_bucket=st.integers(1, 100))
@settings(max_examples=int(300 * SIZE), deadline=None)
def test_layout_covers_every_block_once(rows: int, blocks: int, rows_per_bucket: int) -> None:
    edges = block_edges(rows, blocks)
    layout = lay_out(edges, rows_per_bucket)
    assert [block for unit in layout.units for block in unit.blocks] == list(range(blocks))
    assert [bucket for unit in layout.units for bucket in unit.buckets] == list(range(len(layout.bounds)))
    ends = [*layout.bounds[1:].tolist(), rows]
    assert all(end - start <= rows_per_bucket for start, end in zip(layout.bounds.tolist(), ends, strict=True))
    for unit in layout.units:
        assert layout.bounds[unit.buckets.start] == edges[unit.blocks.start]
        assert len(unit.blocks) == 1 or len(unit.buckets) == 1
