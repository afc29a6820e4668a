"""What of a model is held in few bits: head, embedding and routers never, and what people name."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from jllm.errors import UserError
from jllm.models.weights.quantisation import Quantisation, QuantisationPlan, plan_quantisation, stored_quantisation
from jllm.models.weights.source import causal_class
from tests.models.tiny import tiny_config

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def plan(family: str, **how: Any) -> QuantisationPlan:
    config = tiny_config(family)
    return plan_quantisation(config, causal_class(config), Quantisation(**{"bits": 4, **how}), folder=Path("none"))


def leaves(names: frozenset[str]) -> set[str]:
    return {name.rpartition(".")[2] for name in names}


def test_linear_maps_of_the_layers() -> None:
    found = plan("llama")
    assert leaves(found.modules) == set(LINEAR)
    assert len(found.modules) == 4 * len(LINEAR)
    assert found.left_out == ("lm_head",)
    assert found.said() == [
        "28 linear maps in 4 bits (nf4, scales quantised too), quantised while they are loaded",
        "not quantised: lm_head",
    ]


def test_transposed_maps_are_linear_maps() -> None:
    assert leaves(plan("gpt2").modules) == {"c_attn", "c_proj", "c_fc"}


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "granitemoe"])
def test_routers_are_left_and_packed_experts_are_not(family: str) -> None:
    found = plan(family)
    assert found.experts
    assert not leaves(found.modules) & {"gate", "router", "lm_head"}
    assert not any("router" in name.split(".") for name in found.parameters)
    eight = plan(family, bits=8)
    assert not eight.experts
    assert eight.modules == found.modules
    assert "experts" in eight.left_out[0]
    # All of a model is in the plan, or is named.
    assert plan(family, skipped="experts").left_out != found.left_out


def test_what_people_name_is_left() -> None:
    found = plan("llama", skipped="down_proj,model.layers.[0-1].self_attn")
    assert len(found.modules) == 28 - 4 - 8
    assert found.left_out == ("lm_head, model.layers.*.mlp.down_proj, model.layers.*.self_attn.k_proj,"
                              " model.layers.*.self_attn.o_proj, model.layers.*.self_attn.q_proj,"
                              " model.layers.*.self_attn.v_proj",)  # fmt: skip
    assert plan("llama", skipped="lm_head").modules == plan("llama").modules
    with pytest.raises(UserError, match=r"--skip_quant 'down_prj' matches no module of the model.*down_proj"):
        plan("llama", skipped="down_prj")
    with pytest.raises(UserError, match="--load_in_4bit leaves nothing that could be quantised with --skip_quant"):
        plan("llama", skipped="layers")


@pytest.mark.parametrize("bits", [4, 8])
def test_a_folder_that_is_quantised_says_how(tmp_path: Path, bits: int) -> None:
    import torch
    from transformers import BitsAndBytesConfig

    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install .[adapters]")
    config = tiny_config("llama")
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "plain")
    assert stored_quantisation(tmp_path / "plain") is None
    skipped = ["down_proj", "lm_head"]
    given = BitsAndBytesConfig(
        load_in_4bit=bits == 4, load_in_8bit=bits == 8, llm_int8_skip_modules=skipped, llm_int8_threshold=3.0
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=given, dtype=torch.float32)
    loaded.save_pretrained(tmp_path / "stored")
    how = stored_quantisation(tmp_path / "stored")
    assert how == Quantisation(bits=bits, kind="fp4" if bits == 4 else "nf4", double=bits == 8, is_stored=True)
    found = plan_quantisation(config, causal_class(config), how, folder=tmp_path / "stored")
    assert leaves(found.modules) == set(LINEAR) - {"down_proj"}
    assert found.threshold == 3.0


@pytest.mark.parametrize(
    "said",
    [
        {"quant_method": "gptq", "bits": 4, "load_in_4bit": True},
        {"quant_method": "bitsandbytes"},
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": True},
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "int4"},
        {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_has_fp16_weight": True},
        ["bitsandbytes"],
    ],
)
def test_other_folders_are_not_taken_for_one(tmp_path: Path, said: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": said}))
    assert stored_quantisation(tmp_path) is None
    (tmp_path / "config.json").write_text("{")
    assert stored_quantisation(tmp_path) is None
