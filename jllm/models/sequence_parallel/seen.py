"""Attention of a run of queries over the keys before them: each query's documents, windows, soft caps, sinks.

A query at place g of its row sees the keys from its document's first, or the first of its window, to g. Its position id
is its place in its document, so that first key is at g - position: packed documents need nothing else.

Two ways, chosen by the device:

    by lengths   CUDA, half precision, without soft caps and sinks: `torch.nn.attention.varlen`, whose last query of a
                 document sees its last key, so that queries may begin in the middle of one; a device on which
                 `takes_runs` finds it otherwise does without
    in blocks    elsewhere: some queries at a time against the keys that any of them sees, under a mask; several blocks
                 are computed again in the backward pass, so that a mask is never there whole

Cost: `Seen` by lengths waits for the device once a micro-batch and stage, as packed rows do without known bounds.
"""

import dataclasses
import functools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers.integrations.sdpa_attention import repeat_kv

from jllm.models.kernels import available as kernels

BLOCK_ELEMENTS = 2**24
"""Scores of a block, over all rows and heads."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class DocumentRuns:
    """The queries of a run, and the keys that they see, by documents, row after row, as kernels take them.

    Attributes:
        low: of each row, the first key that a query sees.
        queries: bounds [N + 1] of the documents in the queries of all rows.
        keys: the same in the keys from `low` on.
        most_queries, most_keys: of a document.
    """

    low: tuple[int, ...]
    queries: Tensor
    keys: Tensor
    most_queries: int
    most_keys: int

    @classmethod
    def of(cls, first: Tensor, start: int) -> "DocumentRuns":
        """Of the first keys [B, N] of queries that begin at place `start`; waits for their device."""
        found = first.cpu().numpy()
        length = found.shape[1]
        begins = np.ones(found.shape, dtype=bool)
        begins[:, 1:] = found[:, 1:] != found[:, :-1]
        begin = np.flatnonzero(begins)
        end = np.append(begin[1:], found.size)
        counts = end - begin
        seen = start + (end - 1) % length + 1 - found.flatten()[begin]

        def bounds(lengths: NDArray[np.int64]) -> Tensor:
            return torch.from_numpy(np.append(0, lengths.cumsum()).astype(np.int32)).to(first.device)

        return cls(
            low=tuple(found[:, 0].tolist()),
            queries=bounds(counts),
            keys=bounds(seen),
            most_queries=int(counts.max()),
            most_keys=int(seen.max()),
        )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Seen:
    """The keys that each query of a run sees: of query i, at place `start` + i of its row, `first` to that place.

    Attributes:
        start: the place of the run's first query.
        first: places [B, N] of the first keys.
        runs: the same by documents, where a kernel takes that.
    """

    start: int
    first: Tensor
    runs: DocumentRuns | None = None

    @classmethod
    def of(cls, positions: Tensor, start: int, end: int, *, by_lengths: bool = False) -> "Seen":
        """Of the tokens from `start` to `end` of rows with these position ids [B, S]."""
        places = torch.arange(start, end, device=positions.device)
        first = places - positions[:, start:end]
        return cls(start=start, first=first, runs=DocumentRuns.of(first, start) if by_lengths else None)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """What a family does to scores.

    Attributes:
        scaling: what they are multiplied with; None: one over the root of the size of a head.
        window: how many keys a query sees at most, its own among them; None: any number.
        softcap: scores are bent so that they stay below it; None: not.
        sinks: [heads], scores of a key that has no value; None: there is none.
    """

    scaling: float | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


def attend(query: Tensor, key: Tensor, value: Tensor, seen: Seen, scores: Scores) -> Tensor:
    """Queries [B, heads, N, size] over keys and values [B, heads, start + N, size] → [B, heads, N, size of values].

    Keys may have fewer heads, and values another size. The keys are those of places 0 to the last query's.
    """
    assert key.shape[2] == seen.start + query.shape[2], (key.shape, query.shape, seen.start)
    if seen.runs is not None and scores.softcap is None and scores.sinks is None:
        return _by_lengths(query, key, value, seen.runs, scores)
    batch, heads, count, _ = query.shape
    size = max(1, BLOCK_ELEMENTS // (batch * heads * key.shape[2]))
    if count <= size:
        return _of_block(query, key, value, seen.first, seen.start, scores)
    found = []
    for at in range(0, count, size):
        here = slice(at, at + size)
        block = query[:, :, here], key, value, seen.first[:, here], seen.start + at, scores
        found.append(
            checkpoint(_of_block, *block, use_reentrant=False) if torch.is_grad_enabled() else _of_block(*block)
        )
    return torch.cat(found, 2)


@functools.cache
def takes_runs(device: str, dtype: torch.dtype) -> bool:
    """Whether attention by lengths is there on a device, and right for queries that begin in the middle of a document.

    Kernels differ in which key they take for the one of the first query. So it is tried once, with small random
    numbers: results and gradients have to be those of masks.
    """
    if torch.device(device).type not in kernels.BY_LENGTHS_ON or not kernels.HAS_VARLEN or dtype == torch.float32:
        return False
    generator = torch.Generator().manual_seed(0)
    positions = torch.cat([torch.arange(length) for length in (70, 30, 28)])[None].to(device)
    shapes = (2, 78, 64), (1, 128, 64), (1, 128, 64), (2, 78, 64)  # queries from place 50 on, keys, values, a gradient
    query, key, value, weights = (
        torch.randn(1, *shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes
    )
    for window in (None, 40):
        found = []
        for by_lengths in (True, False):
            seen = Seen.of(positions, 50, 128, by_lengths=by_lengths)
            result = attend(query, key, value, seen, Scores(window=window))
            found.append([result, *torch.autograd.grad((result * weights).sum(), (query, key, value))])
        for mine, masked in zip(*found, strict=True):
            if not (mine - masked).abs().max() <= 0.05 * masked.abs().max():
                return False
    return True


def _of_block(query: Tensor, key: Tensor, value: Tensor, first: Tensor, start: int, scores: Scores) -> Tensor:
    """The same by a mask, over the keys that any of these queries sees."""
    places = torch.arange(start, start + query.shape[2], device=query.device)
    if scores.window is not None:
        first = torch.maximum(first, places - scores.window + 1)
    # Elsewhere than on CPU the host would wait for the device to know more.
    low = int(first.min()) if first.device.type == "cpu" else max(0, start + 1 - (scores.window or start + 1))
    keys = torch.arange(low, start + len(places), device=query.device)
    mask = ((keys >= first[..., None]) & (keys <= places[:, None]))[:, None]
    groups = query.shape[1] // key.shape[1]
    key, value = (repeat_kv(each[:, :, low : start + len(places)], groups) for each in (key, value))
    if scores.softcap is None and scores.sinks is None:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scores.scaling)
    found = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scores.scaling is None else scores.scaling)
    if scores.softcap is not None:
        found = torch.tanh(found / scores.softcap) * scores.softcap
    found = found.masked_fill(~mask, -torch.inf)
    if scores.sinks is not None:
        sinks = scores.sinks.to(found.dtype)[:, None, None].expand(*found.shape[:-1], 1)
        found = torch.cat([found, sinks], -1)
    chances = found.softmax(-1, dtype=torch.promote_types(found.dtype, torch.float32)).to(query.dtype)
    return chances[..., : len(keys)] @ value


def _by_lengths(query: Tensor, key: Tensor, value: Tensor, runs: DocumentRuns, scores: Scores) -> Tensor:
    batch, heads, count, _ = query.shape
    key, value = (
        torch.cat([row[:, low:].transpose(0, 1) for row, low in zip(each, runs.low, strict=True)])
        for each in (key, value)
    )
    attended = kernels.by_lengths(
        query.transpose(1, 2).flatten(0, 1),
        key,
        value,
        runs.queries,
        runs.most_queries,
        scores.scaling,
        scores.window,
        keys=(runs.keys, runs.most_keys),
    )
    return attended.view(batch, count, heads, -1).transpose(1, 2)
