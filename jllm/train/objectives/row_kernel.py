"""Rows of products to cross-entropies and their gradients on CUDA: a program goes over a row, and over it once more.

The second time it goes from the end, and most of the row is still in the cache, for few rows are worked on at once. So
gradients cost one read and one write of the products, and losses alone one read.

The highest logit and the sum of exponentials are kept for each group of neighbours that a thread reads at once, and
joined at the end: hardly an exponential is computed twice, and no step waits for the whole program.

Guarantees: fp32 throughout; the same bits in every run. Needs Triton, which PyTorch brings along for CUDA.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from jllm.data.dataset.shards import IGNORE_INDEX

_GROUP = 8
"""Elements that a thread reads at once: 16 bytes of a type of 2."""
_BLOCK = 8192
"""Elements that a program reads at once."""
_WARPS = 32
_LEAST = -3.0e38
"""Below every logit that is finite, and finite itself: a difference of infinities is no number."""


class RowSums(NamedTuple):
    """Of n rows of logits, fp32: the highest [n], and the logarithms of the sums of exp(logit - highest) [n]."""

    highest: Tensor
    totals: Tensor


@triton.jit  # type: ignore[untyped-decorator]
def _logits(products, scale: tl.constexpr, cap: tl.constexpr):  # type: ignore[no-untyped-def]
    found = products * scale
    if cap is not None:
        # cap x tanh; where the exponential is 0 or infinite, it is the limit.
        found = (1 - 2 / (tl.exp(2 * found) + 1)) * cap
    return found


@triton.jit  # type: ignore[untyped-decorator]
def _added(tops, sums, logits):  # type: ignore[no-untyped-def]
    higher = tl.maximum(tops, tl.max(logits, 1))
    return higher, sums * tl.exp(tops - higher) + tl.sum(tl.exp(logits - higher[:, None]), 1)


@triton.jit  # type: ignore[untyped-decorator]
def _gradient(logits, places, label, most, total, factor, cap: tl.constexpr):  # type: ignore[no-untyped-def]
    found = (tl.exp(logits - most - total) - tl.where(places == label, 1.0, 0.0)) * factor
    if cap is not None:
        found *= 1 - (logits / cap) * (logits / cap)
    return found


@triton.jit  # type: ignore[untyped-decorator]
def _rows(  # type: ignore[no-untyped-def]
    rows,
    row_size,
    labels,
    factors,
    factor_step,
    highest,
    totals,
    losses,
    vocabulary: tl.constexpr,
    scale: tl.constexpr,
    cap: tl.constexpr,
    slope: tl.constexpr,
    ignored: tl.constexpr,
    least: tl.constexpr,
    has_sums: tl.constexpr,
    has_gradient: tl.constexpr,
    block: tl.constexpr,
    group: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = rows + row * row_size
    label = tl.load(labels + row)
    places = tl.arange(0, block // group)[:, None] * group + tl.arange(0, group)[None, :]
    end: tl.constexpr = vocabulary // block * block
    if has_sums:
        most = tl.load(highest + row)
        total = tl.load(totals + row)
    else:
        tops = tl.full((block // group,), least, tl.float32)
        sums = tl.zeros((block // group,), tl.float32)
        for first in range(0, end, block):
            products = tl.load(start + first + places, eviction_policy="evict_last").to(tl.float32)
            tops, sums = _added(tops, sums, _logits(products, scale, cap))
        if end < vocabulary:
            inside = end + places < vocabulary
            products = tl.load(start + end + places, mask=inside, other=0.0).to(tl.float32)
            logits = tl.where(inside, _logits(products, scale, cap), -float("inf"))
            tops, sums = _added(tops, sums, logits)
        most = tl.max(tops, 0)
        total = tl.log(tl.sum(sums * tl.exp(tops - most), 0))
        of_target = _logits(tl.load(start + tl.maximum(label, 0)).to(tl.float32), scale, cap)
        tl.store(highest + row, most)
        tl.store(totals + row, total)
        # In this order: where the target is the highest, it is as small as it is, with all its digits.
        tl.store(losses + row, tl.where(label == ignored, 0.0, total - (of_target - most)))
    if has_gradient:
        # Every thread has read the target's product before one of them overwrites it.
        tl.debug_barrier()
        factor = tl.where(label == ignored, 0.0, tl.load(factors + row * factor_step) * slope)
        if end < vocabulary:
            inside = end + places < vocabulary
            products = tl.load(start + end + places, mask=inside, other=0.0).to(tl.float32)
            gradient = _gradient(_logits(products, scale, cap), end + places, label, most, total, factor, cap)
            tl.store(start + end + places, gradient, mask=inside)
        for done in range(0, end, block):
            first = end - block - done
            products = tl.load(start + first + places, eviction_policy="evict_first").to(tl.float32)
            gradient = _gradient(_logits(products, scale, cap), first + places, label, most, total, factor, cap)
            tl.store(start + first + places, gradient)


def cross_entropies(
    rows: Tensor,
    labels: Tensor,
    factor: Tensor | None,
    *,
    scale: float,
    cap: float | None,
    slope: float = 1.0,
    sums: RowSums | None = None,
) -> tuple[Tensor, RowSums]:
    """Cross-entropies [n] of products [n, V], fp32 and 0 where a label is `IGNORE_INDEX`, and the sums behind them.

    Args:
        rows: elements of a row lie side by side; with a `factor` they become the gradient of the cross-entropies.
        labels: [n], int64.
        factor: of the gradient, fp32, a scalar or [n]; None: no gradient is made.
        scale, cap: a logit is product x scale, or cap x tanh(product x scale).
        slope: of the logit at 0: the factor's factor.
        sums: of these rows, where they are known. The cross-entropies are then not made.
    """
    count, vocabulary = rows.shape
    assert rows.stride(1) == 1
    losses = torch.empty(count, device=rows.device)
    found = RowSums(torch.empty_like(losses), torch.empty_like(losses)) if sums is None else sums
    if count:
        with torch.cuda.device_of(rows):
            _rows[(count,)](
                rows,
                rows.stride(0),
                labels.contiguous(),
                losses if factor is None else factor,
                factor.stride(0) if factor is not None and factor.ndim else 0,
                *found,
                losses,
                vocabulary=vocabulary,
                scale=scale,
                cap=cap,
                slope=slope,
                ignored=IGNORE_INDEX,
                least=_LEAST,
                has_sums=sums is not None,
                has_gradient=factor is not None,
                block=_BLOCK,
                group=_GROUP,
                num_warps=_WARPS,
            )
    return losses, found
