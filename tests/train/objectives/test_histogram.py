"""Quantiles out of histograms: within 0.8 % of the exact ones, and the same however the numbers are divided."""

import math

import pytest
import torch

from jllm.train.objectives.histogram import BINS, LEAST, MOST, histogram, quantile


@pytest.mark.parametrize("seed", range(5))
def test_quantiles_are_close_and_do_not_depend_on_the_division(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(10_001, generator=generator).mul(3).exp().clamp(2 * LEAST, MOST / 2)
    counted = torch.rand(10_001, generator=generator) < 0.7
    counts = histogram(numbers, counted)
    assert counts.shape == (BINS,)
    assert counts.dtype == torch.int64
    assert counts.sum() == counted.sum()
    ordered = numbers[counted].sort().values.tolist()
    for share in (0.0, 0.01, 0.1, 0.5, 0.9, 0.99, 1.0):
        exact = ordered[max(1, math.ceil(share * len(ordered))) - 1]
        assert quantile(counts.tolist(), share) == pytest.approx(exact, rel=0.008)
    parts = zip(numbers.split(777), counted.split(777), strict=True)
    assert torch.equal(torch.stack([histogram(*part) for part in parts]).sum(0), counts)


def test_the_ends_of_the_range() -> None:
    odd = torch.tensor([0.0, -1.0, LEAST / 2, math.inf, math.nan, MOST, 1e30])
    for number, expected in zip(odd, [0.0, 0.0, 0.0, MOST, MOST, MOST, MOST], strict=True):
        counts = histogram(number[None], torch.tensor([True])).tolist()
        assert quantile(counts, 0.5) == expected
    assert math.isnan(quantile([0] * BINS, 0.5))
