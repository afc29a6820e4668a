"""Collectives of layers in passes that wait for no other rank: the right shapes, and nobody is there."""

from typing import Any

import pytest
import torch

from jllm.parallel.alone import alone, is_alone
from jllm.parallel.sequence.exchange import gathered, heads_for_tokens, tokens_for_heads
from jllm.parallel.sequence.group import SequenceGroup
from jllm.parallel.tensor.group import TensorGroup, copied, summed

BOUNDS = (0, 3, 8)


def test_it_ends_with_an_error_too() -> None:
    assert not is_alone()
    with alone():
        with alone():
            assert is_alone()
        assert is_alone()
    with pytest.raises(ZeroDivisionError), alone():
        raise ZeroDivisionError
    assert not is_alone()


def test_sums_are_this_ranks_own() -> None:
    group = TensorGroup(rank=0, size=2, handle="nobody")
    value = torch.ones(3, requires_grad=True)
    with alone():
        summed(copied(value, group) * 2, group).sum().backward()  # type: ignore[no-untyped-call]
    assert value.grad is not None
    assert value.grad.tolist() == [2.0] * 3


@pytest.mark.parametrize("rank", [0, 1])
def test_exchanges_have_their_shapes(rank: int) -> None:
    nobody: Any = "nobody"
    group = SequenceGroup(rank=rank, size=2, handle=nobody)
    length = BOUNDS[rank + 1] - BOUNDS[rank]
    part = torch.ones(2, 4, length, 6, requires_grad=True)
    with alone():
        [mine] = heads_for_tokens((part,), group, BOUNDS)
        back = tokens_for_heads(mine, group, BOUNDS)
        [keys] = gathered((part,), group, BOUNDS)
        (mine.sum() + back.sum() + keys.sum()).backward()
    assert mine.shape == (2, 2, 8, 6)
    assert back.shape == part.shape
    assert keys.shape == (2, 4, BOUNDS[rank + 1], 6)
    assert part.grad is not None
    assert part.grad.shape == part.shape
