"""Rows of products to the losses of their tokens, and in place to the gradients of these: all in fp32.

A row is what the output embedding gives a token. Two functions go over rows: one reads them, and tells of each row a
few numbers; the other one reads and overwrites them. On CUDA both are compiled, and go over all rows of a chunk; on CPU
they go over some rows at a time.

Cost: nothing of the size of the rows where they are compiled; elsewhere some fp32 copies of `BLOCK_ELEMENTS` elements.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from jllm.data.dataset.shards import IGNORE_INDEX
from jllm.train.objectives.token_losses import OF_CROSS_ENTROPY

BLOCK_ELEMENTS = 2**20
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

    def statistics(self, rows: Tensor, labels: Tensor, factor: Tensor) -> Statistics:
        """Of products [n, V], with losses and gradients 0 where a label is `IGNORE_INDEX`; these `factor` times."""
        trained = labels != IGNORE_INDEX
        logits = self._logits(rows.float())
        highest = logits.amax(1, keepdim=True)
        total = (logits - highest).exp().sum(1, keepdim=True).log()
        of_targets = self._logits(rows.gather(1, labels.clamp(min=0)[:, None]).float())
        # In this order: where the target is the highest, it is as small as it is, with all its digits.
        losses, slopes = self._of((total - (of_targets - highest))[:, 0])
        slopes = torch.where(trained, slopes * (factor * self.factor), 0.0)
        return highest, total, torch.where(trained, losses, 0.0), slopes

    def write_gradient(self, rows: Tensor, labels: Tensor, highest: Tensor, total: Tensor, slopes: Tensor) -> None:
        """Products [n, V] become the gradient of their losses."""
        logits = self._logits(rows.float())
        probabilities = (logits - highest).sub_(total).exp_()
        is_target = torch.arange(rows.shape[1], device=rows.device) == labels[:, None]
        gradient = torch.where(is_target, probabilities - 1, probabilities).mul_(slopes[:, None])
        if self.cap is not None:
            gradient = gradient * (1 - (logits / (self._sharpness * self.cap)).square())
        rows.copy_(gradient)

    @property
    def _sharpness(self) -> float:
        return self.gamma if self.kind == "star" else 1.0

    def _logits(self, products: Tensor) -> Tensor:
        """Of the loss: those of the head, sharper for `star`."""
        if self.cap is not None:
            return torch.tanh(products * (self.factor / self.cap)) * (self._sharpness * self.cap)
        factor = self._sharpness * self.factor
        return products if factor == 1.0 else products * factor

    def _of(self, ce: Tensor) -> tuple[Tensor, Tensor]:
        """(losses, their slopes over the head's logits by those of the cross-entropy), of the logits' cross-entropy."""
        of = OF_CROSS_ENTROPY.get(self.kind)
        if of is None:
            # `star` is divided by what its logits are multiplied with.
            return ce / self._sharpness, torch.ones_like(ce)
        slopes: Tensor = torch.func.grad(lambda each: of(each, self.gamma).sum())(ce)
        return of(ce, self.gamma), slopes


def compiles(device: torch.device) -> bool:
    """Whether rows on this device are worked on by a compiled function."""
    return device.type == "cuda" and not _failed


def losses_of(of: RowLoss, rows: Tensor, labels: Tensor, factor: Tensor, *, has_gradient: bool) -> Tensor:
    """Losses [n] of products [n, V], in the way that is fast on their device.

    Args:
        of: what the losses are.
        rows: with `has_gradient` they become the gradient of the summed losses.
        labels: [n]; where they are `IGNORE_INDEX`, loss and gradient are 0.
        factor: of the gradient, a scalar or [n].
        has_gradient: whether it is made.
    """
    size = max(1, BLOCK_ELEMENTS // rows.shape[1])
    if compiles(rows.device):
        # Here: it takes a second, which a run on CPU need not wait.
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        try:
            return _losses(*_compiled(of), rows, labels, factor, has_gradient)
        except (FailOnRecompileLimitHit, TorchDynamoException) as error:
            # Nothing is written yet: compiling comes before that, in the second function too.
            _failed.append(True)
            logging.getLogger(__name__).warning("the loss runs uncompiled, which is slower: %s", error)
    blocks = zip(rows.split(size), labels.split(size), factor.expand(len(labels)).split(size), strict=True)
    return torch.cat([_losses(of.statistics, of.write_gradient, *block, has_gradient) for block in blocks])


def _losses(
    statistics: Callable[..., Statistics],
    write_gradient: Callable[..., None],
    rows: Tensor,
    labels: Tensor,
    factor: Tensor,
    has_gradient: bool,
) -> Tensor:
    highest, total, losses, slopes = statistics(rows, labels, factor)
    if has_gradient:
        write_gradient(rows, labels, highest, total, slopes)
    return losses


_failed: list[bool] = []


@functools.cache
def _compiled(of: RowLoss) -> tuple[Callable[..., Statistics], Callable[..., None]]:
    """Each loss for itself; its numbers are constants."""
    whole = functools.partial(torch.compile, fullgraph=True, dynamic=False)
    return whole(of.statistics), whole(of.write_gradient)
