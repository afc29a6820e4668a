"""Rows of products to the losses of their tokens, and in place to the gradients of these: all in fp32.

A row is what the output embedding gives a token. On CUDA one function goes over all rows of a chunk, compiled: it reads
them once, and once more where it writes. On CPU it goes over some rows at a time, which stay in the cache.

Cost: nothing of the size of the rows where it is compiled; elsewhere some fp32 copies of `BLOCK_ELEMENTS` elements.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from jllm.data.dataset.shards import IGNORE_INDEX
from jllm.train.objectives.token_losses import OF_CROSS_ENTROPY

BLOCK_ELEMENTS = 2**22
Rows = Callable[[Tensor, Tensor, Tensor, bool], Tensor]
"""(rows [n, V], labels [n], factor of the gradient, whether to write it) → losses [n]."""


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

    def __call__(self, rows: Tensor, labels: Tensor, factor: Tensor, has_gradient: bool) -> Tensor:
        """Losses [n] of products [n, V], 0 where a label is `IGNORE_INDEX`.

        With `has_gradient` the products become the gradient of the summed losses, times `factor`, a scalar.
        """
        trained = labels != IGNORE_INDEX
        places = labels.clamp(min=0)[:, None]
        logits = self._logits(rows.float())
        logarithms = logits.log_softmax(1)
        ce = -logarithms.gather(1, places)[:, 0]
        losses, slopes = self._of(ce)
        if has_gradient:
            slopes = torch.where(trained, slopes * (factor * self.factor), 0.0)[:, None]
            # p - 1 with all its digits, where the target is nearly certain.
            of_targets = torch.expm1(-ce)[:, None] * slopes
            gradient = logarithms.exp_().mul_(slopes)
            if self.cap is not None:
                below = 1 - (logits / (self._sharpness * self.cap)).square()
                of_targets, gradient = of_targets * below.gather(1, places), gradient * below
            rows.copy_(gradient).scatter_(1, places, of_targets.to(rows.dtype))
        return torch.where(trained, losses, 0.0)

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


def rows_of(of: RowLoss, rows: Tensor, labels: Tensor, factor: Tensor, has_gradient: bool) -> Tensor:
    """What `of` makes of all rows, in the way that is fast on their device."""
    if compiles(rows.device):
        from torch._dynamo.exc import TorchDynamoException  # here: it takes a second, which a run on CPU need not wait

        try:
            return _compiled(of)(rows, labels, factor, has_gradient)
        except TorchDynamoException as error:
            # Nothing has run yet: compiling comes first.
            _failed.append(True)
            logging.getLogger(__name__).warning("the loss runs uncompiled, which is slower: %s", error)
    size = max(1, BLOCK_ELEMENTS // rows.shape[1])
    blocks = zip(rows.split(size), labels.split(size), strict=True)
    return torch.cat([of(block, targets, factor, has_gradient) for block, targets in blocks])


_failed: list[bool] = []


@functools.cache
def _compiled(of: RowLoss) -> Rows:
    """Each loss for itself; its numbers are constants."""
    compiled: Rows = torch.compile(of.__call__, fullgraph=True, dynamic=False)
    return compiled
