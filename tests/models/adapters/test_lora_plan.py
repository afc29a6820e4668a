"""Which modules get adapters, and that peft puts what is stored into the same places."""

import contextlib
import os

import pytest
import torch

pytest.importorskip("peft", reason="peft is not installed: pip install .[adapters]")

from jllm.errors import UserError
from jllm.models.adapters.lora_plan import LoraChoice, LoraPlan, plan_lora, targets_of
from jllm.models.weights.source import bare_model, causal_class
from tests.models.tiny import causal_types, tiny_config

SIZE = int(os.environ.get("JLLM_TEST_SIZE", "1"))
FAMILIES = causal_types() if SIZE > 4 else causal_types()[:: 6 - SIZE]
"""A fifth of all; from JLLM_TEST_SIZE 5 on every one."""
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}


def plan(family: str, **choice: object) -> LoraPlan:
    config = tiny_config(family)
    return plan_lora(config, causal_class(config), LoraChoice(**{"rank": 4, "alpha": 4.0, **choice}))  # type: ignore[arg-type]


def leaves(names: tuple[str, ...]) -> set[str]:
    return {name.rpartition(".")[2] for name in names}


def test_all_linear_maps_of_the_layers() -> None:
    found = plan("llama")
    assert leaves(found.modules) == ATTENTION | MLP
    assert set(found.config.target_modules) == ATTENTION | MLP, "short names, which other tools read"
    assert found.config.layers_to_transform is None
    assert not found.parameters
    assert not found.left_out


@pytest.mark.parametrize(
    "text", ["q_proj,down_proj", "(q|down)_proj", r"self_attn.q_proj,mlp.down_proj", r".*\.(q|down)_proj"]
)
def test_names_and_patterns(text: str) -> None:
    found = plan("llama", targets=text)
    assert leaves(found.modules) == {"q_proj", "down_proj"}
    assert len(found.modules) == 2 * tiny_config("llama").num_hidden_layers


def test_a_module_stands_for_what_is_in_it() -> None:
    assert leaves(plan("llama", targets="self_attn").modules) == ATTENTION


def test_layers_have_both_ends() -> None:
    found = plan("llama", layers="1:2")
    assert {name.split(".")[2] for name in found.modules} == {"1", "2"}
    assert found.config.layers_to_transform == [1, 2]
    assert set(targets_of(found.config, tiny_config("llama"), causal_class(tiny_config("llama"))).modules) == set(
        found.modules
    )


def test_the_head_and_the_embedding_are_named() -> None:
    found = plan("llama", targets="all-linear,lm_head,embed_tokens")
    assert {"lm_head", "model.embed_tokens"} < set(found.modules)


def test_packed_experts_are_in_by_name_and_said_where_left_out() -> None:
    without, with_ = plan("qwen3_moe"), plan("qwen3_moe", targets="all-linear,experts")
    assert not without.parameters
    assert "packed experts" in without.left_out[0]
    assert leaves(with_.parameters) == {"gate_up_proj", "down_proj"}
    assert not with_.left_out


def test_routers_are_in_by_name() -> None:
    assert not any("gate" in name.split(".")[-1] for name in plan("mixtral").modules)
    assert leaves(plan("mixtral", targets="mlp.gate").parameters) == {"weight"}


def test_what_peft_cannot_address_is_left_out_and_said() -> None:
    """peft takes the names of these linear maps for packed experts, in a mixture whose layout has changed."""
    found = plan("deepseek_v3")
    assert not leaves(found.modules) & MLP
    assert any("shared_experts.down_proj" in line for line in found.left_out)


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_targets_the_same_in_every_family(family: str) -> None:
    """`plan_lora` compares what it chose with what peft makes of the stored configuration."""
    try:
        config = tiny_config(family)
        family_class = causal_class(config)
        bare_model(config, family_class, dtype=torch.float32)
    except Exception as error:
        pytest.skip(f"no such model can be built here: {error}")
    assert plan_lora(config, family_class, LoraChoice(rank=2, alpha=2.0)).modules
    with_experts = LoraChoice(rank=2, alpha=2.0, targets="all-linear,.*experts.*")
    with contextlib.suppress(UserError):
        plan_lora(config, family_class, with_experts)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"targets": "qproj"}, "--lora_target_modules 'qproj' matches no module of the model. Did you mean"),
        ({"targets": "input_layernorm"}, "--lora_target_modules 'input_layernorm' matches no module of the model"),
        ({"targets": "q_proj("}, "--lora_target_modules 'q_proj(' is not a regular expression"),
        ({"layers": "2:9"}, "--lora_layers '2:9': '2:9' is not within the model's layers"),
        ({"layers": "0:1", "targets": "lm_head"}, "--lora_target_modules 'lm_head' with --lora_layers '0:1' leaves no"),
        ({"saved": "head"}, "--modules_to_save 'head' matches no module of the model"),
    ],
)  # fmt: skip
def test_mistakes(choice: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as refused:
        plan("llama", **choice)
    assert str(refused.value).startswith(message)
