"""Plain attention of whole rows, by one mask: what shared rows have to equal."""

from typing import Any

import torch
from torch import Tensor


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    *,
    scaling: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """[B, heads, S, size] over fewer heads of keys and values, documents by their position ids [B, S]."""
    groups = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key)
    scores = scores * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    documents = (positions == 0).cumsum(1)
    places = torch.arange(positions.shape[1])
    distance = places[:, None] - places
    mask = (documents[:, :, None] == documents[:, None]) & (distance >= 0)
    if window is not None:
        mask = mask & (distance < window)
    weights = scores.masked_fill(~mask[:, None], -1e30).exp()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.exp()[:, None, None]
    return torch.einsum("bhqk,bhkd->bhqd", weights / total, value)


def random_positions(generator: torch.Generator, batch: int, length: int, share: float) -> Tensor:
    """Position ids of rows whose documents begin anywhere, after about `share` of the tokens."""
    starts = torch.rand(batch, length, generator=generator) < share
    starts[:, 0] = True
    places = torch.arange(length)
    return places - torch.where(starts, places, 0).cummax(1).values


def random_heads(case: dict[str, Any], generator: torch.Generator) -> list[Tensor]:
    """Queries, keys, values, sinks of a case, in fp64; values are wider than keys."""
    batch, length = case["batch"], case["length"]
    shapes = [(case["queries"], 4), (case["keys"], 4), (case["keys"], 6)]
    found = [torch.randn(batch, heads, length, size, generator=generator).double() for heads, size in shapes]
    return [*found, torch.randn(case["queries"], generator=generator).double()]
