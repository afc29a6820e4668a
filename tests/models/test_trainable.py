"""What trains: patterns by name, layers by number, the same on every stage, also where a stage trains nothing."""

from pathlib import Path

import pytest
import torch

from jllm.errors import UserError
from jllm.models.trainable import ParameterChoice, attached_parameters, choose, parse_layers, select_trainable
from tests.models.chain import chained_loss_and_gradients, load_chain, packed_batch
from tests.models.family_check import make_folder
from tests.models.small_adapter import attach_adapters
from tests.models.tiny import tiny_config

torch.set_num_threads(1)
NAMES = (
    "model.embed_tokens.weight",
    *(
        f"model.layers.{layer}.{part}.weight"
        for layer in range(12)
        for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "input_layernorm")
    ),
    "model.norm.weight",
    "lm_head.weight",
)


def chosen(**options: str) -> list[str]:
    return choose(NAMES, ParameterChoice(**options), layers="model.layers", num_layers=12)


def test_patterns() -> None:
    assert chosen() == list(NAMES)
    assert len(chosen(target_modules="q_proj")) == 12
    assert len(chosen(target_modules="q_proj,o_proj")) == 24
    assert len(chosen(target_modules="self_attn")) == 24
    assert len(chosen(target_modules=r"model\.layers\.\d{1,2}\.mlp.*")) == 12
    assert chosen(target_modules="lm_head") == ["lm_head.weight"]
    assert chosen(target_modules=r"layers\.1") == [name for name in NAMES if name.startswith("model.layers.1.")]
    assert len(chosen(frozen_modules="embed_tokens,lm_head")) == len(NAMES) - 2
    assert len(chosen(target_modules="self_attn", frozen_modules="o_proj")) == 12
    assert chosen(layers_to_transform="11", target_modules=".*norm") == ["model.layers.11.input_layernorm.weight"]
    assert len(chosen(layers_to_transform="0:1,11")) == 12


def test_layers() -> None:
    assert parse_layers("0:7,24:31", 32) == [*range(8), *range(24, 32)]
    assert parse_layers(" 3 ", 4) == [3]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"target_modules": "q_porj"}, 'Did you mean "q_proj"'),
        ({"frozen_modules": "("}, "not a regular expression"),
        ({"layers_to_transform": "0:12"}, "0 to 11"),
        ({"layers_to_transform": "a"}, "not a layer"),
        ({"layers_to_transform": "3:1"}, "not within"),
        ({"target_modules": "q_proj", "frozen_modules": "self_attn"}, "nothing to train"),
    ],
)
def test_mistakes(options: dict[str, str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        chosen(**options)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_stages_train_what_the_whole_model_would(family: str, tmp_path: Path) -> None:
    tied = family == "qwen2"
    make_folder(tiny_config(family, tied=tied), tmp_path)
    ids, integers = packed_batch(96)
    for selection in (
        ParameterChoice(layers_to_transform="3"),
        ParameterChoice(target_modules="q_proj", layers_to_transform="0:1"),
        ParameterChoice(frozen_modules="embed_tokens"),
    ):
        results = []
        for boundaries in ([0, 4], [0, 1, 3, 4]):
            stages = load_chain(tmp_path, boundaries)
            picked = [select_trainable(stage.model, stage.span, selection) for stage in stages]
            results.append(chained_loss_and_gradients(stages, ids, integers))
            assert set(results[-1][1]) == {name for selected in picked for name in selected.names}
        assert results[0][1].keys() == results[1][1].keys()
        for name, gradient in results[0][1].items():
            torch.testing.assert_close(results[1][1][name], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "own", "adapters"),
    [
        ({}, True, [0, 1, 3]),
        ({"frozen_modules": "model,lm_head"}, False, []),
        ({"frozen_modules": ".*_proj,.*norm,embed_tokens,lm_head"}, False, [0, 1, 3]),
        ({"frozen_modules": "adapter"}, True, []),
        ({"frozen_modules": r"layers\.0\.adapter"}, True, [1, 3]),
        ({"target_modules": "q_proj", "layers_to_transform": "2"}, True, [0, 1, 3]),
    ],
)
def test_what_is_attached_trains_unless_it_is_frozen(
    options: dict[str, str], own: bool, adapters: list[int], tmp_path: Path
) -> None:
    """On every stage alike, one with nothing attached to it included; and gradients are those of one stage."""
    make_folder(tiny_config("llama"), tmp_path)
    choice = ParameterChoice(**options)
    results = []
    for boundaries in ([0, 4], [0, 2, 3, 4]):
        stages = load_chain(tmp_path, boundaries)
        attached = [name for stage in stages for name in attach_adapters(stage.model, stage.span, (0, 1, 3))]
        assert [name for stage in stages for name in attached_parameters(stage.model, stage.span)] == attached
        if not own and not adapters:
            for stage in stages:
                with pytest.raises(UserError, match="nothing to train"):
                    select_trainable(stage.model, stage.span, choice, attached=attached)
            continue
        picked = [select_trainable(stage.model, stage.span, choice, attached=attached) for stage in stages]
        trained = {name for selected in picked for name in selected.names}
        assert trained & set(attached) == {f"model.layers.{index}.adapter.weight" for index in adapters}
        assert bool(trained - set(attached)) == own
        results.append(chained_loss_and_gradients(stages, *packed_batch(96)))
        assert results[-1][1].keys() == trained
    if results:
        (_, whole), (_, chained) = results
        for name, gradient in whole.items():
            assert gradient.any(), name
            torch.testing.assert_close(chained[name], gradient, atol=1e-5, rtol=1e-4)
