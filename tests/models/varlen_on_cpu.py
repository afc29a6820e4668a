"""`torch.nn.attention.varlen` for tests: as opaque to a compiler as the real one, on CPU."""

from typing import Any

import torch
from torch import Tensor

ENABLE_GQA = frozenset({"window_size", "enable_gqa"})
WITHOUT = frozenset({"window_size"})


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    bounds_of_keys: Tensor,
    longest: int,
    longest_of_keys: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    """Causal; with or without `enable_gqa`, which some versions want to be told and others do not know."""
    assert is_causal or window_size[1] == 0
    assert options in ({}, {"enable_gqa": query.shape[1] > key.shape[1]})
    return _forward(query, key, value, bounds, longest, scale, window_size[0])


def _weights(query: Tensor, key: Tensor, bounds: Tensor, longest: int, scale: float | None, left: int) -> Tensor:
    """[heads, T, T] of heads-first tensors."""
    assert int(bounds.diff().max()) <= longest
    at = torch.arange(query.shape[1])
    document = torch.bucketize(at, bounds, right=True)
    distance = at[:, None] - at
    seen = (document[:, None] == document) & (distance >= 0)
    if left >= 0:
        seen &= distance <= left
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    return scores.masked_fill(~seen, -torch.inf).softmax(-1)


def _heads_first(query: Tensor, *others: Tensor) -> list[Tensor]:
    """[heads, T, size], keys and values repeated for all heads of queries."""
    groups = [query.shape[1] // each.shape[1] for each in others]
    repeated = (each.repeat_interleave(count, dim=1) for each, count in zip(others, groups, strict=True))
    return [each.transpose(0, 1) for each in (query, *repeated)]


@torch.library.custom_op("jllm_tests::by_lengths", mutates_args=())
def _forward(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float | None, left: int
) -> Tensor:
    query, key, value = _heads_first(query, key, value)
    attended = _weights(query, key, bounds, longest, scale, left) @ value
    return attended.transpose(0, 1).contiguous()


@_forward.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float | None, left: int
) -> Tensor:
    return query.new_empty(*query.shape[:2], value.shape[2])


@torch.library.custom_op("jllm_tests::by_lengths_backward", mutates_args=())
def _backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    longest: int,
    scale: float | None,
    left: int,
) -> tuple[Tensor, Tensor, Tensor]:
    heads = key.shape[1]
    query, key, value = _heads_first(query, key, value)
    weights = _weights(query, key, bounds, longest, scale, left)
    gradient = gradient.transpose(0, 1)
    of_weights = gradient @ value.mT
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True)) * factor
    first, second, third = of_scores @ key, of_scores.mT @ query, weights.mT @ gradient
    # Those of repeated heads add up.
    second, third = (each.unflatten(0, (heads, -1)).sum(1) for each in (second, third))
    return tuple(each.transpose(0, 1).contiguous() for each in (first, second, third))  # type: ignore[return-value]


@_backward.register_fake
def _(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.others = inputs[4:]


def _pass_back(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    return *_backward(gradient, *ctx.saved_tensors, *ctx.others), None, None, None, None


_forward.register_autograd(_pass_back, setup_context=_keep)
