"""Where a family keeps its parts: told by its shape alone; what has another shape is refused in one line."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from jllm.errors import UserError
from jllm.models.pipeline.structure import count_layers, find_routers, find_structure, whole_structure
from tests.models.tiny import LAYERS, tiny_config


def model_of(family: str, **overrides: object) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(tiny_config(family, **overrides))
    return model


@pytest.mark.parametrize(
    ("family", "layers", "before", "after"),
    [
        ("llama", "model.layers", ("model.embed_tokens",), ("model.norm", "lm_head")),
        ("gpt2", "transformer.h", ("transformer.wte", "transformer.wpe"), ("transformer.ln_f", "lm_head")),
        # Its last norm is registered before the layers.
        (
            "opt",
            "model.decoder.layers",
            ("model.decoder.embed_tokens", "model.decoder.embed_positions"),
            ("model.decoder.final_layer_norm", "lm_head"),
        ),
    ],
)
def test_parts(family: str, layers: str, before: tuple[str, ...], after: tuple[str, ...]) -> None:
    model = model_of(family)
    structure = find_structure(model)
    assert (structure.layers, structure.num_layers) == (layers, LAYERS)
    assert (structure.before, set(structure.after)) == (before, set(after))
    assert structure.embedding == before[0]
    assert whole_structure(model) == structure


@pytest.mark.parametrize("tied", [False, True])
def test_ties_and_names(tied: bool) -> None:
    structure = find_structure(model_of("llama", tie_word_embeddings=tied))
    assert structure.tied == ((("lm_head.weight", "model.embed_tokens.weight"),) if tied else ())
    assert ("lm_head.weight" in structure.parameters) != tied
    assert "lm_head.weight" in structure.stored


def test_routers_are_those_that_the_family_declares() -> None:
    model = model_of("mixtral")
    assert list(find_routers(model)) == [f"model.layers.{layer}.mlp.gate" for layer in range(LAYERS)]
    assert find_structure(model).routers == tuple(find_routers(model))
    assert find_routers(model_of("llama")) == {}


def test_other_shapes_are_refused() -> None:
    with torch.device("meta"):
        loose, twice, plain = (LlamaForCausalLM(tiny_config("llama")) for _ in range(3))
    loose.model.scale = nn.Parameter(torch.ones(1))
    twice.model.other = nn.ModuleList(nn.Linear(2, 2) for _ in range(LAYERS))
    twice.model.layers, twice.model.more = nn.ModuleList(), twice.model.layers
    plain.config.num_hidden_layers = 0
    for model, says in (
        (loose, r"has parameters outside its modules \(scale\)"),
        (twice, "has 2 lists of 4 layers"),
        (plain, "does not say how many decoder layers"),
    ):
        with pytest.raises(UserError, match=says) as caught:
            find_structure(model)
        assert "\n" not in str(caught.value)
        assert whole_structure(model).layers == ""


def test_layers_are_counted_as_they_are_listed() -> None:
    assert count_layers(LlamaConfig(num_hidden_layers=7)) == 7
    assert count_layers(tiny_config("longcat_flash")) == 4  # two attentions in each
