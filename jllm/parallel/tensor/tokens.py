"""Hidden states between sliced layers, of which each rank has some tokens (Korthikanti et al., 2022, section 4.2).

What all ranks have alike is cut along the tokens by `own_tokens`, and whole again by `all_tokens`; sums over the ranks'
slices go to their tokens at once by `scattered`. All ranks have equally many: rows are padded with zeros.

Guarantees: the numbers that whole rows have, up to the order of sums. Cost: an all-gather of the hidden state one way
and a reduce-scatter the other way, together what an all-reduce sends.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from jllm.parallel.tensor.group import TensorGroup


def own_tokens(hidden: Tensor, group: TensorGroup) -> Tensor:
    """[B, S, width], alike on all ranks → this rank's tokens [B, S / ranks, width]."""
    result: Tensor = _Some.apply(hidden, group, False)  # type: ignore[no-untyped-call]
    return result


def all_tokens(part: Tensor, length: int, group: TensorGroup, *, is_partial: bool) -> Tensor:
    """Each rank's tokens → [B, length, width].

    `is_partial`: what is computed of it is a part of a sum, so the gradients of all ranks are added; else all ranks
    have the same gradient.
    """
    result: Tensor = _All.apply(part, length, group, is_partial)  # type: ignore[no-untyped-call]
    return result


def scattered(part: Tensor, group: TensorGroup) -> Tensor:
    """Each rank's part of a sum [B, S, width] → of the sum this rank's tokens."""
    result: Tensor = _Some.apply(part, group, True)  # type: ignore[no-untyped-call]
    return result


def _cut(hidden: Tensor, group: TensorGroup) -> Tensor:
    return _padded(hidden, group).chunk(group.size, 1)[group.rank].contiguous()


def _padded(hidden: Tensor, group: TensorGroup) -> Tensor:
    missing = -hidden.shape[1] % group.size
    return pad(hidden, (0, 0, 0, missing)) if missing else hidden


def _joined(part: Tensor, length: int, group: TensorGroup) -> Tensor:
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(group.size)]
    dist.all_gather(parts, part.contiguous(), group=group.handle)
    return torch.cat(parts, 1)[:, :length].contiguous()


def _summed_cut(part: Tensor, group: TensorGroup) -> Tensor:
    padded = _padded(part, group)
    if dist.get_backend(group.handle) == "gloo":  # which has no reduce-scatter on every machine
        total = padded.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group.handle)
        return total.chunk(group.size, 1)[group.rank].contiguous()
    pieces = [piece.contiguous() for piece in padded.chunk(group.size, 1)]
    found = torch.empty_like(pieces[0])
    dist.reduce_scatter(found, pieces, group=group.handle)
    return found


class _Some(torch.autograd.Function):
    """Of whole rows, or of the sum of the ranks' parts, this rank's tokens."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: TensorGroup, is_partial: bool) -> Tensor:
        ctx.group, ctx.length = group, hidden.shape[1]
        return (_summed_cut if is_partial else _cut)(hidden, group)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _joined(gradient, ctx.length, ctx.group), None, None


class _All(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, length: int, group: TensorGroup, is_partial: bool) -> Tensor:
        ctx.group, ctx.is_partial = group, is_partial
        return _joined(part, length, group)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (_summed_cut if ctx.is_partial else _cut)(gradient, ctx.group), None, None, None
