"""Row by row the bytes and scales are those of the whole tensor."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install .[adapters]")

from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_quant, quantize_4bit

from jllm.models.weights import quantising
from jllm.models.weights.quantisation import Quantisation
from jllm.parallel.tensor.slices import Slice, chunks_of_packed

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def drawn(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.one_of(
        st.tuples(st.integers(1, 90), st.integers(1, 90)),
        st.tuples(st.integers(1, 4), st.integers(1, 30), st.integers(1, 30)),
    ),
    dtype=st.sampled_from(FLOATS),
    kind=st.sampled_from(["nf4", "fp4"]),
    double=st.booleans(),
    at_a_time=st.sampled_from([64, 500, 1 << 18]),
    transposed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_4_bits_row_by_row(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    kind: str,
    double: bool,
    at_a_time: int,
    transposed: bool,
    seed: int,
) -> None:
    value = drawn(shape, dtype, seed)
    if transposed:
        value = value.transpose(-1, -2)
    expected, wanted = quantize_4bit(value.contiguous(), compress_statistics=double, quant_type=kind, blocksize=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantising, "ELEMENTS", at_a_time)
        packed, state = quantising.quantise_4bit(value, Quantisation(bits=4, kind=kind, double=double))
    assert torch.equal(packed, expected)
    assert torch.equal(state.absmax, wanted.absmax)
    assert (state.shape, state.dtype, state.blocksize, state.quant_type) == (value.shape, dtype, 64, kind)
    if double:
        assert torch.equal(state.state2.absmax, wanted.state2.absmax)
        assert torch.equal(state.offset, wanted.offset)
    if shape[-1] % 2 == 0 and not transposed and len(packed) > 1:
        assert torch.equal(dequantize_4bit(packed, state), dequantize_4bit(expected, wanted))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.sampled_from([(64,), (256,), (3, 64)]),
    blocks=st.sampled_from([2, 8]),
    axis=st.integers(-2, -1),
    size=st.sampled_from([2, 4]),
    rank=st.integers(0, 1),
    is_packed=st.booleans(),
    double=st.booleans(),
)
def test_a_slice_in_4_bits_has_the_whole_weights_values(
    rows: tuple[int, ...], blocks: int, axis: int, size: int, rank: int, is_packed: bool, double: bool
) -> None:
    """Rows, columns, parts of two maps behind one another; scales stay quantised where whole blocks are left."""
    value = drawn((*rows, 64 * blocks), torch.float32, rank)
    length = value.shape[axis]
    lengths = (length // 2, length // 2) if is_packed else (length,)
    part = Slice(shape=tuple(value.shape), axis=axis % value.ndim, ranges=chunks_of_packed(lengths, size, rank))
    packed, state = quantising.quantise_4bit(value, Quantisation(bits=4, double=double))
    if part.in_blocks(64) is None:
        with pytest.raises(ValueError, match="blocks of 64 weights are cut"):
            quantising.slice_4bit(packed, state, part)
        return
    own, read = quantising.slice_4bit(packed, state, part)
    assert torch.equal(dequantize_4bit(own, read), part.of(dequantize_4bit(packed, state)))
    whole_groups = (part.in_blocks(64) or part).in_blocks(256)
    assert read.nested == (double and whole_groups is not None)
    assert own.nbytes * 2 == value.numel() // size
    by_itself, alone = quantising.quantise_4bit(part.seen_in(value), Quantisation(bits=4, double=False))
    assert torch.equal(own, by_itself)
    assert double or torch.equal(read.absmax, alone.absmax)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 200),
    columns=st.integers(1, 90),
    dtype=st.sampled_from(FLOATS),
    at_a_time=st.sampled_from([64, 500, 1 << 18]),
    seed=st.integers(0, 99),
)
def test_8_bits_row_by_row(rows: int, columns: int, dtype: torch.dtype, at_a_time: int, seed: int) -> None:
    value = drawn((rows, columns), dtype, seed)
    expected, scales, _ = int8_vectorwise_quant(value.to(torch.float16))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantising, "ELEMENTS", at_a_time)
        found = quantising.quantise_8bit(value)
    assert torch.equal(found.data, expected)
    assert torch.equal(found.SCB, scales)
    assert found.CB.data_ptr() == found.data_ptr(), "held once"


@pytest.mark.parametrize("double", [False, True])
def test_bytes_of_a_parameter(double: bool) -> None:
    how = Quantisation(bits=4, double=double)
    packed, state = quantising.quantise_4bit(drawn((256, 512), torch.bfloat16, 0), how)
    held = packed.nbytes + state.absmax.nbytes + (state.state2.absmax.nbytes if double else 0)
    assert held == how.bytes_of_a_parameter * 256 * 512
    assert 0.5 < how.bytes_of_a_parameter < 0.57
