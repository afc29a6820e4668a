"""What a process has of its parameters: regions that are what it holds, and that read back as it."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from jllm.parallel.tensor.slices import Ranges, chunks_of_packed, cut
from jllm.train.checkpoint.held import parts_of, read_parts
from jllm.train.checkpoint.regions import Region


def elements(whole: Tensor, region: Region) -> Tensor:
    """Those of a region, by slicing alone."""
    inside = tuple(slice(first, first + count) for first, count in zip(region.offset, region.extent, strict=True))
    return whole[inside].reshape(-1)[region.start : region.stop]


@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    data=st.data(),
    pieces=st.integers(1, 3),
    size=st.integers(1, 3),
)
def test_runs_of_slices(shape: list[int], data: st.DataObject, pieces: int, size: int) -> None:
    axis = data.draw(st.integers(0, len(shape) - 1))
    lengths = tuple([shape[axis]] * pieces)
    shape = [*shape[:axis], sum(lengths), *shape[axis + 1 :]]
    whole = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
    ranges: Ranges = chunks_of_packed(lengths, size, data.draw(st.integers(0, size - 1)))
    module = nn.Module()
    module.register_parameter("weight", nn.Parameter(whole.clone()))
    if size > 1:
        cut(module, "weight", axis, ranges)
    weight = module.get_parameter("weight")
    start = data.draw(st.integers(0, weight.numel()))
    stop = data.draw(st.integers(start, weight.numel()))
    run = weight.detach().reshape(-1)[start:stop]
    parts = parts_of(weight, start, stop)
    assert sum(part.region.size for part in parts) == stop - start
    for part in parts:
        assert part.region.shape == tuple(shape)
        assert torch.equal(part.of(run), elements(whole, part.region))
    found = read_parts(lambda region: elements(whole, region), weight, start, stop)
    assert found is not None
    assert torch.equal(found, run)
    if stop > start:
        assert read_parts(lambda region: None, weight, start, stop) is None
