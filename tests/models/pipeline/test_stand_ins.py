"""Stand-ins: in the right shape, without a parameter, and with what a family's loop asks its layers for."""

import pytest
import torch
from torch import nn

from jllm.models.pipeline.stand_ins import AbsentEmbedding, AbsentLayer, AbsentModule


class Layer(nn.Module):
    """A layer of some family."""

    is_causal = True

    def __init__(self) -> None:
        super().__init__()
        self.attention_type = "sliding_attention"
        self.weight = nn.Parameter(torch.ones(3))

    def set_mode(self) -> None:
        raise AssertionError("not on this stage")


def test_layer_answers_for_the_replaced_one() -> None:
    layer = AbsentLayer(Layer(), 0)
    assert layer.attention_type == "sliding_attention"
    assert layer.is_causal
    assert layer.set_mode() is None
    assert not list(layer.parameters())
    with pytest.raises(AttributeError):
        _ = layer.nothing_of_the_kind


@pytest.mark.parametrize("returned", [0, 1, 3])
def test_layer_hands_on_what_it_is_given(returned: int) -> None:
    layer = AbsentLayer(Layer(), returned)
    hidden = torch.rand(2, 3, 8)
    for output in (layer(hidden), layer(hidden_states=hidden)):
        assert (output[0] if returned else output) is hidden
        assert not returned or output[1:] == (None,) * (returned - 1)
    assert layer.sent is None


def test_entrance_and_exit() -> None:
    entrance, leave = AbsentLayer(Layer(), 0), AbsentLayer(Layer(), 0)
    received, other = torch.rand(2, 3, 8), torch.zeros(2, 3, 8)
    entrance.received, leave.is_exit = received, True
    assert leave(entrance(other)) is received
    assert leave.sent is received


def test_embedding_adds_nothing() -> None:
    absent = AbsentEmbedding(nn.Embedding(7, 8, dtype=torch.bfloat16))
    for output in (absent(torch.ones(2, 3, dtype=torch.int64)), absent(input_ids=torch.ones(2, 3, dtype=torch.int64))):
        assert output.shape == (2, 3, 8)
        assert output.dtype == torch.bfloat16
        assert not output.any()
    assert not list(absent.parameters())


def test_module_keeps_the_shape() -> None:
    hidden = torch.rand(2, 3, 8)
    assert AbsentModule(nn.LayerNorm(8))(hidden) is hidden
    assert AbsentModule(nn.Linear(8, 8))(hidden) is hidden
    assert AbsentModule(nn.Linear(8, 50))(hidden).shape == (2, 3, 50)
