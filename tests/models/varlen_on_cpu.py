"""`torch.nn.attention.varlen` for tests: as opaque to a compiler as the real one, on CPU."""

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import repeat_kv

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
    """Causal; with or without `enable_gqa`."""
    assert is_causal or window_size[1] == 0
    assert options.get("enable_gqa", False) or query.shape[1] == key.shape[1]
    return _forward(query, key, value, bounds, longest, scale, window_size[0])


def _attend(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float | None, left: int
) -> Tensor:
    assert int(bounds.diff().max()) <= longest
    groups = query.shape[1] // key.shape[1]
    query, key, value = (each.transpose(0, 1)[None] for each in (query, key, value))
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    at = torch.arange(query.shape[2])
    document = torch.bucketize(at, bounds, right=True)
    distance = at[:, None] - at
    seen = (document[:, None] == document) & (distance >= 0)
    if left >= 0:
        seen &= distance <= left
    attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scale)
    return attended[0].transpose(0, 1).contiguous()


@torch.library.custom_op("jllm_tests::by_lengths", mutates_args=())
def _forward(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float | None, left: int
) -> Tensor:
    return _attend(query, key, value, bounds, longest, scale, left)


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
    with torch.enable_grad():
        inputs = [each.detach().requires_grad_() for each in (query, key, value)]
        attended = _attend(*inputs, bounds, longest, scale, left)  # type: ignore[misc]
        first, second, third = torch.autograd.grad(attended, inputs, gradient)
    return first.contiguous(), second.contiguous(), third.contiguous()


@_backward.register_fake
def _(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.others = inputs[4:]


def _pass_back(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    return *_backward(gradient, *ctx.saved_tensors, *ctx.others), None, None, None, None


_forward.register_autograd(_pass_back, setup_context=_keep)
