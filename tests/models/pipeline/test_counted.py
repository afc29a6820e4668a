"""A model without memory: what it is alone is remembered, whatever is attached to it."""

import pytest
from torch import nn
from transformers import PreTrainedModel

from jllm.errors import UserError
from jllm.models.pipeline.counted import CountedModel
from tests.models.tiny import tiny_config


def attach(model: PreTrainedModel) -> None:
    for layer in model.get_submodule("model.layers").children():
        layer.get_submodule("mlp").extra = nn.Linear(4, 4, bias=False, device="meta")


def test_what_is_attached_is_not_the_models_own() -> None:
    alone, more = (CountedModel.of(tiny_config("llama"), attach=given) for given in (None, attach))
    assert more.structure == alone.structure
    assert len(more.parameters) == len(alone.parameters) + 4
    assert len(more.cut_parameters()) == len(alone.cut_parameters()) == 2 + 4 * 7
    assert not alone.halves
    assert len(CountedModel.of(tiny_config("llama"), in_halves=True).halves) == 4
    with pytest.raises(UserError, match="cannot be cut inside"):
        CountedModel.of(tiny_config("cohere"), in_halves=True)
