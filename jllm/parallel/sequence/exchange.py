"""What passes between ranks that share the tokens of rows: heads for tokens and back, or all keys before a run's end.

Values are [B, heads, tokens, size]; the ranks' runs may have unlike lengths, which all of them know (`bounds`).

Guarantees: each function is exact, and so is its gradient, which goes the opposite way: a rank's numbers are copied,
and the gradients of all copies are added up. Costs: one collective a call and pass. `heads_for_tokens` and
`tokens_for_heads` send each number once; `gathered` sends each rank's numbers to all others and has the row's keys and
values whole, and their gradients until these are summed over the ranks.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from jllm.parallel.alone import is_alone
from jllm.parallel.sequence.group import SequenceGroup


def heads_for_tokens(parts: Sequence[Tensor], group: SequenceGroup, bounds: Sequence[int]) -> list[Tensor]:
    """This run's tokens with all heads → all tokens with this rank's share of the heads, of each part.

    Args:
        parts: [B, heads, own tokens, size] each; ranks divide their heads.
    """
    ranks, batch = group.size, parts[0].shape[0]
    assert all(part.shape[1] % ranks == 0 for part in parts), "ranks do not divide the heads"
    sent = [list(each) for each in zip(*(part.chunk(ranks, 1) for part in parts), strict=True)]
    shapes = [[(batch, part.shape[1] // ranks, length, part.shape[3]) for part in parts] for length in _lengths(bounds)]
    received = _exchanged(sent, shapes, group)
    return [torch.cat(of_ranks, 2) for of_ranks in zip(*received, strict=True)]


def tokens_for_heads(value: Tensor, group: SequenceGroup, bounds: Sequence[int]) -> Tensor:
    """The inverse, of one value: [B, share of the heads, tokens, size] → [B, heads, own tokens, size]."""
    batch, share, _, size = value.shape
    lengths = _lengths(bounds)
    shape = (batch, share, lengths[group.rank], size)
    received = _exchanged([[part] for part in value.split(lengths, 2)], [[shape]] * group.size, group)
    return torch.cat([part for [part] in received], 1)


def gathered(parts: Sequence[Tensor], group: SequenceGroup, bounds: Sequence[int]) -> list[Tensor]:
    """Of each part [B, heads, own tokens, size] all tokens up to the end of this rank's run."""
    lengths = _lengths(bounds)
    # Tokens first: ranks then have unlike numbers of equal rows, which are filled up to the most.
    rows = torch.cat([part.permute(2, 0, 1, 3).flatten(1) for part in parts], 1)
    filled = pad(rows, (0, 0, 0, max(lengths) - len(rows)))
    everyone = _Gathered.apply(filled, group)  # type: ignore[no-untyped-call]
    before = torch.cat([everyone[rank, : lengths[rank]] for rank in range(group.rank + 1)])
    shapes = [(part.shape[0], part.shape[1], part.shape[3]) for part in parts]
    found = before.split([_size([shape]) for shape in shapes], 1)
    return [value.unflatten(1, shape).permute(1, 2, 0, 3) for value, shape in zip(found, shapes, strict=True)]


def _lengths(bounds: Sequence[int]) -> list[int]:
    return [end - start for start, end in itertools.pairwise(bounds)]


def _size(shapes: Sequence[tuple[int, ...]]) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes)


def _exchanged(
    sent: list[list[Tensor]], shapes: Sequence[Sequence[tuple[int, ...]]], group: SequenceGroup
) -> list[list[Tensor]]:
    """Send some values to each rank, and get some from each, which have these shapes."""
    flat = [torch.cat([value.flatten() for value in values]) for values in sent]
    taken = [_size(each) for each in shapes]
    found = _Exchanged.apply(torch.cat(flat), list(map(len, flat)), taken, group.handle)  # type: ignore[no-untyped-call]
    return [
        [piece.view(shape) for piece, shape in zip(part.split([_size([shape]) for shape in each]), each, strict=True)]
        for part, each in zip(found.split(taken), shapes, strict=True)
    ]


def _all_to_all(flat: Tensor, sizes: list[int], taken: list[int], handle: Any) -> Tensor:
    if is_alone():
        return flat.new_zeros(sum(taken))
    received = flat.new_empty(sum(taken))
    dist.all_to_all_single(received, flat.contiguous(), taken, sizes, group=handle)
    return received


class _Exchanged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flat: Tensor, sizes: list[int], taken: list[int], handle: Any) -> Tensor:
        ctx.back = taken, sizes, handle
        return _all_to_all(flat, sizes, taken, handle)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(gradient, *ctx.back), None, None, None


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: SequenceGroup) -> Tensor:
        ctx.group = group
        if is_alone():
            return rows.repeat(group.size, *[1] * rows.ndim)
        found = rows.new_empty(group.size, *rows.shape)
        dist.all_gather(list(found), rows.contiguous(), group=group.handle)
        return found

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        if is_alone():
            return gradient[ctx.group.rank].clone(), None
        own = torch.empty_like(gradient[0], memory_format=torch.contiguous_format)
        dist.reduce_scatter(own, list(gradient.contiguous()), group=ctx.group.handle)
        return own, None
