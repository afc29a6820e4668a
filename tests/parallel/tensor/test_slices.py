"""Slices of a tensor: together they are the whole of it, once."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from jllm.parallel.tensor.slices import Slice, chunk, chunks_of_packed, cut, slice_of, whole_shape


@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    block=st.integers(1, 6),
    draw=st.data(),
)
def test_a_part_in_blocks_has_its_elements(shape: list[int], block: int, draw: st.DataObject) -> None:
    """Blocks of elements that follow one another: either all of a block's elements are in the part, or none."""
    axis = draw.draw(st.integers(0, len(shape) - 1))
    ends = sorted(draw.draw(st.sets(st.integers(0, shape[axis]), min_size=2)) if shape[axis] else (0, 1))
    ranges = tuple(zip(ends[::2], ends[1::2], strict=False))
    part, count = Slice(shape=tuple(shape), axis=axis, ranges=ranges), math.prod(shape)
    elements = part.of(torch.arange(count).view(shape)).flatten().tolist()
    numbers = torch.arange(-(-count // block))
    inside = [number for number in numbers.tolist() if any(each // block == number for each in elements)]
    expected = [each for number in inside for each in range(number * block, min((number + 1) * block, count))]
    found = part.in_blocks(block)
    if found is not None:
        blocks = found.of(numbers.view(found.shape)).flatten().tolist()
        assert blocks == inside
        assert elements == expected
    elif math.prod(shape[axis:]) % block == 0:
        assert elements != expected


@given(length=st.integers(1, 40), size=st.integers(1, 8))
def test_chunks_are_those_of_torch(length: int, size: int) -> None:
    expected = [each.tolist() for each in torch.arange(length).chunk(size)]
    found = [list(range(*chunk(length, size, rank))) for rank in range(size)]
    assert found == expected + [[]] * (size - len(expected))


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3), size=st.integers(1, 4))
def test_packed_parts_cover_each_part_once(lengths: list[int], size: int) -> None:
    ranges = [chunks_of_packed(tuple(lengths), size, rank) for rank in range(size)]
    covered = sorted(place for each in ranges for start, stop in each for place in range(start, stop))
    assert covered == list(range(sum(lengths)))
    for number, length in enumerate(lengths):
        first = sum(lengths[:number])
        assert all(first <= start <= stop <= first + length for start, stop in (each[number] for each in ranges))


def test_a_parameter_remembers_what_it_is_of() -> None:
    layer = nn.Linear(3, 8)
    whole = layer.weight.detach().clone()
    layer.weight.requires_grad_(False)
    cut(layer, "weight", 0, ((1, 2), (5, 7)))
    assert slice_of(layer.weight) == Slice(shape=(8, 3), axis=0, ranges=((1, 2), (5, 7)))
    assert torch.equal(layer.weight, whole[[1, 5, 6]])
    assert not layer.weight.requires_grad
    assert (whole_shape(layer.weight), whole_shape(layer.bias)) == ((8, 3), (8,))
    assert slice_of(layer.bias) is None
    part = Slice(shape=(2, 6), axis=1, ranges=((0, 1), (3, 4)))
    assert part.local_shape == (2, 2)
    assert part.of(torch.arange(12).view(2, 6)).tolist() == [[0, 3], [6, 9]]
