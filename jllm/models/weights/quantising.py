"""Tensors to 4 and 8 bits: what bitsandbytes makes of whole ones, with little memory beside.

On CPU some rows at a time, because bitsandbytes' own code there holds a tensor several times over in fp32; the scales
of all rows are then quantised together. On a device with memory of its own, whose kernels need no more, all at once.

A slice of a weight in few bits has the values of the whole weight. In 4 bits it has whole blocks of it.

Guarantees: the bytes and scales of `bitsandbytes.functional` on the same kind of device.
Cost: on CPU `ELEMENTS` weights in fp32 a few times, beside the result.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
from bitsandbytes.functional import (
    QuantState,
    dequantize_blockwise,
    get_4bit_type,
    int8_vectorwise_quant,
    quantize_blockwise,
)
from bitsandbytes.nn.modules import Int8Params, Linear8bitLt, Params4bit
from bitsandbytes.nn.parametrize import Bnb4bitParametrization
from torch import Tensor, nn

from jllm.models.weights.quantisation import BLOCK, BLOCKS, Quantisation
from jllm.parallel.tensor.slices import Slice

ELEMENTS = 1 << 16
"""Weights that are quantised at a time on CPU."""


def quantise_4bit(value: Tensor, how: Quantisation) -> tuple[Tensor, QuantState]:
    """What `bitsandbytes.functional.quantize_4bit` gives for a tensor of two or three axes, some rows at a time on CPU.

    Returns:
        Bytes, two weights each, [(elements + 1) // 2, 1]; and how to read them.
    """
    rows = value.flatten(0, -2)
    packed = torch.empty(((rows.numel() + 1) // 2, 1), dtype=torch.uint8, device=value.device)
    scales = torch.empty(-(-rows.numel() // BLOCK), dtype=torch.float32, device=value.device)
    for first, part in _parts(rows):
        bytes_, absmax = torch.ops.bitsandbytes.quantize_4bit.default(part, BLOCK, how.kind, torch.uint8)
        start = first * rows.shape[1]
        packed[start // 2 : start // 2 + len(bytes_)] = bytes_
        scales[start // BLOCK : start // BLOCK + len(absmax)] = absmax
    offset = state2 = None
    if how.double:
        offset = scales.mean()
        scales, state2 = quantize_blockwise(scales - offset, blocksize=BLOCKS)
    state = QuantState(
        absmax=scales,
        shape=value.shape,
        dtype=value.dtype,
        blocksize=BLOCK,
        code=get_4bit_type(how.kind, device=value.device),
        quant_type=how.kind,
        offset=offset,
        state2=state2,
    )
    return packed, state


def quantise_8bit(value: Tensor) -> Any:
    """Whole numbers [rows, columns] and a scale for each row, some rows at a time on CPU."""
    numbers = torch.empty(value.shape, dtype=torch.int8, device=value.device)
    scales = torch.empty(len(value), dtype=torch.float32, device=value.device)
    for first, part in _parts(value):
        own, scale, _ = int8_vectorwise_quant(part.to(torch.float16))
        numbers[first : first + len(own)] = own
        scales[first : first + len(own)] = scale
    return params_8bit(numbers, scales)


def slice_4bit(packed: Tensor, state: QuantState, part: Slice) -> tuple[Tensor, QuantState]:
    """The bytes of a part of a whole weight, and how to read them: in whole blocks, each with its scale.

    Scales that are quantised too stay so where the part has whole blocks of them; elsewhere they become fp32.

    Raises:
        ValueError: the part has some of a block's weights without the others.
    """
    pairs, blocks = part.in_blocks(2), part.in_blocks(state.blocksize)
    if pairs is None or blocks is None:
        raise ValueError(f"blocks of {state.blocksize} weights are cut")
    scales, state2, offset = state.absmax, state.state2, state.offset
    if state.nested:
        if (groups := blocks.in_blocks(state2.blocksize)) is None:
            scales = dequantize_blockwise(scales, state2) + offset
            state2 = offset = None
        else:
            state2 = QuantState(
                absmax=groups.of(state2.absmax.view(groups.shape)).flatten(),
                code=state2.code,
                blocksize=state2.blocksize,
                dtype=state2.dtype,
            )
    own = QuantState(
        absmax=blocks.of(scales.view(blocks.shape)).flatten(),
        shape=torch.Size(part.local_shape),
        dtype=state.dtype,
        blocksize=state.blocksize,
        code=state.code,
        quant_type=state.quant_type,
        offset=offset,
        state2=state2,
    )
    return pairs.of(packed.view(pairs.shape)).view(-1, 1), own


def slice_8bit(weight: Any, part: Slice) -> Any:
    """A part of a weight in 8 bits: rows with their scales, or columns, beside the scales of whole rows."""
    scales = dataclasses.replace(part, shape=part.shape[:1]).of(weight.SCB) if part.axis == 0 else weight.SCB
    return params_8bit(part.of(weight.data), scales)


def params_4bit(module: Any, packed: Tensor, state: QuantState) -> Any:
    """The weight of a `Linear4bit`, which is told how to read it."""
    module.quant_state = state
    return Params4bit(
        packed,
        requires_grad=False,
        quant_state=state,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        quant_storage=torch.uint8,
        module=module,
        bnb_quantized=True,
    )


def params_8bit(numbers: Tensor, scales: Tensor) -> Any:
    """The weight of a `Linear8bitLt`."""
    held = Int8Params(numbers, requires_grad=False, has_fp16_weights=False, SCB=scales)
    held.CB = held.data
    return held


def is_quantised(parameter: Any) -> bool:
    """Whether a parameter of a bitsandbytes module holds a quantised weight, and how to read it."""
    if isinstance(parameter, Params4bit):
        return parameter.quant_state is not None
    return isinstance(parameter, Int8Params) and parameter.SCB is not None


def held_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters, of quantised ones with their scales."""
    total = sum(parameter.nbytes for parameter in model.parameters())
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if isinstance(module, Bnb4bitParametrization):
            state = module.quant_state
        if isinstance(state, QuantState):
            total += state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
        elif isinstance(module, Linear8bitLt):
            weight: Any = module.weight
            scales = weight.SCB if weight.SCB is not None else module.state.SCB
            total += scales.nbytes if scales is not None else 0
    return total


def _parts(rows: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Number of the first row, and rows whose weights fill whole blocks; all of them on a device of its own memory."""
    columns = rows.shape[1]
    least = BLOCK // math.gcd(BLOCK, columns)
    count = len(rows) if rows.device.type != "cpu" else max(ELEMENTS // (columns * least), 1) * least
    for first in range(0, len(rows), count):
        yield first, rows[first : first + count].contiguous()
