"""Rows of products to the losses of their tokens, and in place to the gradients of these: all in fp32.

A row is what the output embedding gives a token. On CUDA one kernel goes over all rows of a chunk
(`jllm.train.objectives.row_kernel`). Elsewhere two functions go over some rows at a time: one reads them, and tells of
each row a few numbers; the other one reads and overwrites them.

Cost: nothing of the size of the rows on CUDA; elsewhere some fp32 copies of `BLOCK_ELEMENTS` elements.
"""

import dataclasses
import functools
import importlib.util
import logging

import torch
from torch import Tensor

from jllm.data.dataset.shards import IGNORE_INDEX
from jllm.parallel.tensor.vocabulary import VocabularyShard
from jllm.train.objectives.token_losses import OF_CROSS_ENTROPY

BLOCK_ELEMENTS = 2**20
ELSEWHERE = -1
"""The label of a token whose target another rank's part of the vocabulary has."""
Statistics = tuple[Tensor, Tensor, Tensor, Tensor]
"""Of n rows: the highest logits [n, 1], the logarithms of the sums of exp(logit - highest) [n, 1], the losses [n], and
what the gradient of the cross-entropy is multiplied with [n]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowLoss:
    """From products to losses.

    Attributes:
        kind, gamma: the loss of a token (`jllm.train.objectives.token_losses`).
        factor, cap: from products to logits (`jllm.models.pipeline.head.PlainHead`).
    """

    kind: str = "cross_entropy"
    gamma: float = 1.0
    factor: float = 1.0
    cap: float | None = None

    def statistics(
        self, rows: Tensor, labels: Tensor, factor: Tensor, shard: VocabularyShard | None = None
    ) -> Statistics:
        """Of products [n, V], with losses and gradients 0 where a label is `IGNORE_INDEX`; these `factor` times."""
        trained = labels != IGNORE_INDEX
        logits = self._logits(rows.float())
        highest = logits.amax(1, keepdim=True)
        total = (logits - highest).exp().sum(1, keepdim=True).log()
        of_targets = self.of_targets(rows, labels)[:, None]
        if shard is not None:
            highest, total, of_targets = _of_all_parts(highest, total, of_targets, shard)
        # In this order: where the target is the highest, it is as small as it is, with all its digits.
        losses, slopes = self.of_cross_entropy((total - (of_targets - highest))[:, 0])
        slopes = torch.where(trained, slopes * (factor * self.factor), 0.0)
        return highest, total, torch.where(trained, losses, 0.0), slopes

    def write_gradient(self, rows: Tensor, labels: Tensor, highest: Tensor, total: Tensor, slopes: Tensor) -> None:
        """Products [n, V] become the gradient of their losses."""
        logits = self._logits(rows.float())
        probabilities = (logits - highest).sub_(total).exp_()
        is_target = torch.arange(rows.shape[1], device=rows.device) == labels[:, None]
        gradient = torch.where(is_target, probabilities - 1, probabilities).mul_(slopes[:, None])
        if self.ceiling is not None:
            gradient = gradient * (1 - (logits / self.ceiling).square())
        rows.copy_(gradient)

    @property
    def sharpness(self) -> float:
        """What the head's logits are multiplied with."""
        return self.gamma if self.kind == "star" else 1.0

    @property
    def scale(self) -> float:
        """From products to the loss' logits, or to what these are the hyperbolic tangent of."""
        return self.sharpness * self.factor if self.cap is None else self.factor / self.cap

    @property
    def ceiling(self) -> float | None:
        """The loss' logits are below it."""
        return None if self.cap is None else self.sharpness * self.cap

    def _logits(self, products: Tensor) -> Tensor:
        """Of the loss: those of the head, sharper for `star`."""
        if self.ceiling is not None:
            return torch.tanh(products * self.scale) * self.ceiling
        return products if self.scale == 1.0 else products * self.scale

    def of_targets(self, rows: Tensor, labels: Tensor) -> Tensor:
        """The logits [n] of the targets, of any token where there is none, and 0 where it is in another part."""
        found = self._logits(rows.gather(1, labels.clamp(min=0)[:, None]).float())[:, 0]
        return found.masked_fill(labels == ELSEWHERE, 0.0)

    def of_cross_entropy(self, ce: Tensor) -> tuple[Tensor, Tensor]:
        """(losses, their slopes over the head's logits by those of the cross-entropy), of the logits' cross-entropy."""
        of = OF_CROSS_ENTROPY.get(self.kind)
        if of is None:
            # `star` is divided by what its logits are multiplied with.
            return ce / self.sharpness, torch.ones_like(ce)
        slopes: Tensor = torch.func.grad(lambda each: of(each, self.gamma).sum())(ce)
        return of(ce, self.gamma), slopes


def losses_of(
    of: RowLoss,
    rows: Tensor,
    labels: Tensor,
    factor: Tensor,
    *,
    has_gradient: bool,
    shard: VocabularyShard | None = None,
) -> Tensor:
    """Losses [n] of products [n, V], in the way that is fast on their device.

    Args:
        of: what the losses are.
        rows: with `has_gradient` they become the gradient of the summed losses.
        labels: [n]; where they are `IGNORE_INDEX`, loss and gradient are 0.
        factor: of the gradient, a scalar or [n].
        has_gradient: whether it is made.
        shard: which part of the vocabulary the products are of, as other ranks have those of the others; the losses are
            those of the whole one, on every rank.
    """
    if shard is not None:
        inside = (labels >= shard.start) & (labels < shard.stop)
        labels = torch.where(inside, labels - shard.start, torch.where(labels == IGNORE_INDEX, labels, ELSEWHERE))
    if has_kernel(rows.device):
        return _by_kernel(of, rows, labels, factor, has_gradient=has_gradient, shard=shard)
    # Ranks that share a vocabulary take the same tokens at a time.
    size = max(1, BLOCK_ELEMENTS // (rows.shape[1] if shard is None else shard.largest))
    found = []
    for block in zip(rows.split(size), labels.split(size), factor.expand(len(labels)).split(size), strict=True):
        highest, total, losses, slopes = of.statistics(*block, shard)
        if has_gradient:
            of.write_gradient(*block[:2], highest, total, slopes)
        found.append(losses)
    return torch.cat(found)


def _by_kernel(
    of: RowLoss,
    rows: Tensor,
    labels: Tensor,
    factor: Tensor,
    *,
    has_gradient: bool,
    shard: VocabularyShard | None,
) -> Tensor:
    from jllm.train.objectives.row_kernel import RowSums, cross_entropies

    over = functools.partial(cross_entropies, rows, labels, scale=of.scale, cap=of.ceiling, slope=of.factor)
    if of.kind not in OF_CROSS_ENTROPY and shard is None:
        # Of these the slope over the cross-entropy is 1: nothing lies between losses and gradients.
        losses, _ = over(factor if has_gradient else None)
        return losses if of.sharpness == 1.0 else losses / of.sharpness
    ce, sums = over(None)
    if shard is not None:
        highest, totals, of_targets = _of_all_parts(*sums, of.of_targets(rows, labels), shard)
        sums = RowSums(highest, totals)
        ce = sums.totals - (of_targets - sums.highest)
    losses, slopes = of.of_cross_entropy(ce)
    if has_gradient:
        over(slopes * factor, sums=sums)
    return torch.where(labels != IGNORE_INDEX, losses, 0.0)


def _of_all_parts(
    highest: Tensor, totals: Tensor, of_targets: Tensor, shard: VocabularyShard
) -> tuple[Tensor, Tensor, Tensor]:
    """What ranks found of their parts of the vocabulary, to what holds for all of it, alike on all of them.

    Args:
        highest: logits.
        totals: logarithms of the sums of exp(logit - highest).
        of_targets: logits of the targets, 0 where another rank has them.
        shard: this rank's part.
    """
    most = shard.highest(highest)
    return most, shard.total((totals + (highest - most)).exp()).log(), shard.total(of_targets)


@functools.cache
def has_kernel(device: torch.device) -> bool:
    """Whether rows on this device have a kernel of their own: tried once, and said where it does not work."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    try:
        from jllm.train.objectives.row_kernel import cross_entropies

        one = torch.ones(1, 8, device=device, dtype=torch.bfloat16)
        cross_entropies(one, torch.zeros(1, device=device, dtype=torch.int64), one[0, 0].float(), scale=1.0, cap=None)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:  # whatever a compiler lacks on this machine
        said = (str(error) or type(error).__name__).splitlines()[0]
        logging.getLogger(__name__).warning("the loss has no kernel here, and is slower: %s", said)
        return False
    return True
