"""Causal attention within the documents of packed rows on CUDA, by a kernel of our own.

Rows lie end to end; a program takes some positions of them, whatever documents these belong to, and goes over the keys
from the first that one of its queries sees. So the host knows no lengths, and documents without number cost nothing.
The query heads that share a key head are worked on together: positions of a program are fewer, hardly a product is
made across the edge of a document, and keys are read once. The softmax is that of flash-attention (Dao, 2023,
arXiv:2307.08691), with probabilities made again in the backward pass.

Guarantees: sums in fp32; the same bits in every run, for no sum depends on an order. Keeps the output and one fp32 a
token and head for the backward pass. Needs Triton, which PyTorch brings along for CUDA.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from jllm.models.kernels import programs

SIZES = (64, 128)
"""Elements of a head that the kernel is for."""
_LOWEST = -1.0e30
"""Below every score that is finite, and finite itself: a difference of infinities is no number."""


class Tile(NamedTuple):
    """How a kernel is cut: query rows (positions x heads worked on together) and keys of a tile, and its launch."""

    rows: int
    keys: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """Of the three kernels."""

    output: Tile
    queries: Tile
    keys: Tile


TILES = {
    64: Tiles(output=Tile(64, 64, 4, 3), queries=Tile(64, 32, 4, 3), keys=Tile(128, 64, 4, 2)),
    128: Tiles(output=Tile(64, 32, 4, 3), queries=Tile(64, 64, 4, 2), keys=Tile(64, 128, 8, 3)),
}
"""By the size of a head, measured on an H200."""


def fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernel is for such tensors, and for their device: it was measured on Hopper alone."""
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] in SIZES
        and query.shape[-1] == key.shape[-1] == value.shape[-1]
        and _is_hopper()
    )


# A compiler does not follow the question, and need not: the answer stays.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
@functools.cache
def _is_hopper() -> bool:
    return torch.cuda.get_device_capability()[0] == 9


def attend(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, scaling: float | None, window: int | None
) -> Tensor:
    """Attention [T, heads, size] of queries [T, heads, size] to keys and values [T, key heads, size], in their type.

    Args:
        bounds: [documents + 1], int32, from 0 to T and never falling: where documents begin.
        scaling: of scores; None: 1 / sqrt(size).
        window: keys that a query sees at most, its own among them; None: all of its document.
    """
    size = query.shape[-1]
    scale = size**-0.5 if scaling is None else scaling
    output: Tensor = _attended(_rowwise(query), _rowwise(key), _rowwise(value), bounds.contiguous(), scale, window)[0]
    return output


def _rowwise(tensor: Tensor) -> Tensor:
    """The same; the elements of a head lie side by side."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _shared(heads: int, key_heads: int, window: int | None, bounds: Tensor, tile: Tile) -> dict[str, Any]:
    """What all kernels are told: how many query heads go together is the power of 2 in the heads of a key head."""
    groups = heads // key_heads
    documents = bounds.shape[0] - 1
    return {
        "steps": max(documents - 1, 0).bit_length(),
        "groups": groups,
        # Tiles keep 16 positions at least.
        "together": min(groups & -groups, tile.rows // 16),
        "window": window,
        "rows": tile.rows,
        "keys": tile.keys,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


@torch.library.custom_op("jllm::packed_attention", mutates_args=())
def _attended(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """The output, and the logarithms (to base 2) of the sums behind it, [heads, T], fp32."""
    tokens, heads, size = query.shape
    output = query.new_empty(query.shape)
    sums = torch.empty(heads, tokens, dtype=torch.float32, device=query.device)
    tile = TILES[size].output
    options = _shared(heads, key.shape[1], window, bounds, tile)
    grid = (heads // options["together"] * triton.cdiv(tokens, tile.rows // options["together"]),)
    with torch.cuda.device_of(query):
        programs.output[grid](
            query,
            key,
            value,
            output,
            sums,
            bounds,
            *query.stride()[:2],
            *key.stride()[:2],
            *value.stride()[:2],
            tokens,
            heads,
            bounds.shape[0] - 1,
            scale * math.log2(math.e),
            size=size,
            lowest=_LOWEST,
            **options,
        )
    return output, sums


_attended.register_fake(
    lambda query, *_: (query.new_empty(query.shape), query.new_empty(query.shape[1::-1], dtype=torch.float32))
)


@torch.library.custom_op("jllm::packed_attention_backward", mutates_args=())
def _gradients(
    slope: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    sums: Tensor,
    bounds: Tensor,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of queries, keys and values, where `slope` is that of the output."""
    tokens, heads, size = query.shape
    slope = _rowwise(slope)
    found = query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)
    deltas = torch.empty_like(sums)
    tiles = TILES[size]
    strides = (*query.stride()[:2], *key.stride()[:2], *value.stride()[:2], *slope.stride()[:2])
    of_score = scale * math.log2(math.e)
    documents = bounds.shape[0] - 1
    with torch.cuda.device_of(query):
        options = _shared(heads, key.shape[1], window, bounds, tiles.queries)
        programs.of_queries[
            (heads // options["together"] * triton.cdiv(tokens, tiles.queries.rows // options["together"]),)
        ](
            query,
            key,
            value,
            output,
            slope,
            found[0],
            sums,
            deltas,
            bounds,
            *strides,
            tokens,
            heads,
            documents,
            of_score,
            scale,
            size=size,
            **options,
        )
        options = _shared(heads, key.shape[1], window, bounds, tiles.keys)
        programs.of_keys[(key.shape[1] * triton.cdiv(tokens, tiles.keys.keys),)](
            query,
            key,
            value,
            slope,
            found[1],
            found[2],
            sums,
            deltas,
            bounds,
            *strides,
            tokens,
            key.shape[1],
            documents,
            of_score,
            scale,
            size=size,
            **options,
        )
    return found


_gradients.register_fake(lambda slope, *given: tuple(each.new_empty(each.shape) for each in given[:3]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, bounds, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(query, key, value, *output, bounds)


def _backward(context: Any, slope: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    query, key, value, output, sums, bounds = context.saved_tensors
    found = _gradients(slope, query, key, value, output, sums, bounds, context.scale, context.window)
    return *found, None, None, None


torch.library.register_autograd("jllm::packed_attention", _backward, setup_context=_keep)
