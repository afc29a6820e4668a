"""Logits of which each rank has those of its part of the vocabulary: what of them all ranks know together.

The logits themselves are never gathered: what travels is a few numbers a token.

Guarantees: every rank gets the same numbers. Cost: `cross_entropies` has the logits once more in fp32, for the backward
pass; three all-reduces of a number a token.
"""

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from jllm.parallel.tensor.group import TensorGroup
from jllm.parallel.tensor.slices import chunk


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class VocabularyShard:
    """A rank's part of the vocabulary: ids [start, stop) of `whole`."""

    start: int
    stop: int
    whole: int
    group: TensorGroup

    @classmethod
    def of(cls, vocabulary: int, group: TensorGroup) -> "VocabularyShard":
        """This rank's."""
        start, stop = chunk(vocabulary, group.size, group.rank)
        return cls(start=start, stop=stop, whole=vocabulary, group=group)

    @property
    def largest(self) -> int:
        """The size of the largest part, the same on all ranks."""
        return chunk(self.whole, self.group.size, 0)[1]

    def has(self, token: int) -> bool:
        """Whether an id is in this part."""
        return self.start <= token < self.stop

    def highest(self, values: Tensor) -> Tensor:
        """The largest of all ranks' numbers, place by place."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def lowest(self, values: Tensor) -> Tensor:
        """The smallest."""
        return self._reduced(values, dist.ReduceOp.MIN)

    def total(self, values: Tensor) -> Tensor:
        """The sum."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def _reduced(self, values: Tensor, operation: Any) -> Tensor:
        found = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(found, op=operation, group=self.group.handle)
        return found

    def side_by_side(self, values: Tensor) -> Tensor:
        """All ranks' [N, k], which is alike, as [N, ranks x k]."""
        found = [torch.empty_like(values) for _ in range(self.group.size)]
        dist.all_gather(found, values.contiguous(), group=self.group.handle)
        return torch.cat(found, -1)

    def of_targets(self, values: Tensor, targets: Tensor) -> Tensor:
        """Of [N, this part] the entries of the targets [N], which are ids of the whole vocabulary, on every rank."""
        return self.total(self._mine(values, targets))

    def _mine(self, values: Tensor, targets: Tensor) -> Tensor:
        inside = (targets >= self.start) & (targets < self.stop)
        places = torch.where(inside, targets - self.start, 0)
        return values.gather(1, places[:, None])[:, 0].masked_fill(~inside, 0)

    def exponentials(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of logits [N, this part]: the largest of each token [N], exp(logits - that), and the sum of these [N]."""
        highest = self.highest(logits.amax(-1))
        powers = (logits - highest[:, None]).exp_()
        return highest, powers, self.total(powers.sum(-1))


def cross_entropies(logits: Tensor, targets: Tensor, shard: VocabularyShard) -> Tensor:
    """-log p of the targets.

    Args:
        logits: [N, this rank's part], fp32.
        targets: [N], ids of the whole vocabulary; for others the result is no cross-entropy.
        shard: which part that is.
    """
    result: Tensor = _CrossEntropies.apply(logits, targets, shard)  # type: ignore[no-untyped-call]
    return result


class _CrossEntropies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, shard: VocabularyShard) -> Tensor:
        highest, powers, total = shard.exponentials(logits)
        ctx.save_for_backward(powers, total, targets)
        ctx.shard = shard
        return highest + total.log() - shard.of_targets(logits, targets)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        powers, total, targets = ctx.saved_tensors
        shard = ctx.shard
        found = powers * (gradient / total)[:, None]
        inside = (targets >= shard.start) & (targets < shard.stop)
        places = torch.where(inside, targets - shard.start, 0)[:, None]
        found.scatter_add_(1, places, -(gradient * inside)[:, None])
        return found, None, None
