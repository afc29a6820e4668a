"""Histograms of numbers from 0 up, out of which quantiles come that do not depend on how the numbers were divided.

A bin holds the numbers of equal exponent and leading `FRACTION_BITS` bits of their fraction, so it is as wide as 1/64
of the power of two below it, and its middle is within 0.8 % of every number in it. Numbers below `LEAST` count as
0, those of `MOST` and above, and NaN, as `MOST`. Counts are whole numbers: they add up exactly over micro-batches,
stages and pipelines. Cost: `BINS` counts, 13 KiB; one pass over the numbers.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FRACTION_BITS = 6
LEAST_EXPONENT, MOST_EXPONENT = -20, 7
LEAST, MOST = 2.0**LEAST_EXPONENT, 2.0**MOST_EXPONENT
BINS = ((MOST_EXPONENT - LEAST_EXPONENT) << FRACTION_BITS) + 2
"""One for what counts as 0, one for what counts as `MOST`, and those between."""
_SHIFT = 23 - FRACTION_BITS  # of a float32's 23 bits of fraction
_FIRST = (127 + LEAST_EXPONENT) << FRACTION_BITS


def histogram(numbers: Tensor, counted: Tensor) -> Tensor:
    """Counts by bin: [BINS], int64.

    Args:
        numbers: of any shape and float type.
        counted: of the same shape, bool: which of them count.
    """
    positive = numbers.float().nan_to_num(nan=MOST).clamp(min=0.0).contiguous()
    # The bits of a positive float32 grow as it does.
    bins = ((positive.view(torch.int32) >> _SHIFT) - _FIRST + 1).clamp(0, BINS - 1)
    bins = torch.where(counted, bins, BINS)
    return torch.bincount(bins.flatten(), minlength=BINS + 1)[:BINS]


def quantile(counts: Sequence[int], share: float) -> float:
    """The number that `share` of all counted numbers are not above: the middle of its bin; NaN where there are none."""
    wanted = max(1, math.ceil(share * sum(counts)))
    seen = 0
    for place, count in enumerate(counts):
        seen += count
        if seen >= wanted:
            return _middle(place)
    return math.nan


def _middle(place: int) -> float:
    if place == 0:
        return 0.0
    if place == BINS - 1:
        return MOST
    exponent, fraction = divmod(place - 1, 1 << FRACTION_BITS)
    return 2.0 ** (exponent + LEAST_EXPONENT) * (1 + (fraction + 0.5) / (1 << FRACTION_BITS))
