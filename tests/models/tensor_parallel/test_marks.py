"""Who acts for a parameter that several slices have, and over whom its gradient is summed."""

import torch
from torch import nn

from jllm.models.tensor_parallel.marks import mark_partial, mark_repeats, mark_shared, partial_gradient, repeats
from jllm.parallel.tensor.group import TensorGroup
from jllm.parallel.tensor.slices import Slice, mark_slice


def model_of() -> nn.ParameterDict:
    found = nn.ParameterDict({name: nn.Parameter(torch.zeros(2)) for name in ("whole", "norm", "slice", "head")})
    for name in ("slice", "head"):
        mark_slice(found[name], Slice(shape=(4,), axis=0, ranges=((0, 2),)))
    mark_partial(found["norm"], "all")
    mark_shared(found["head"], "neighbours")
    return found


def test_gradients_that_are_parts_of_a_sum() -> None:
    model = model_of()
    found = {name: partial_gradient(each) for name, each in model.items()}
    assert found == {"whole": None, "norm": "all", "slice": None, "head": "neighbours"}


def test_everything_is_counted_once() -> None:
    """Of four ranks, two and two of which share a head."""
    by_rank = []
    for rank in range(4):
        model = model_of()
        mark_repeats(model, TensorGroup(rank=rank, size=4, handle=None, sharers=2))
        by_rank.append({name for name, each in model.items() if not repeats(each)})
    assert by_rank == [{"whole", "norm", "slice", "head"}, {"slice"}, {"slice", "head"}, {"slice"}]
