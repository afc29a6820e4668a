"""Which parts of layers are cut how: transformers' word where it has one, and what families usually call theirs."""

import pytest
from transformers import PreTrainedModel

from jllm.models.pipeline.span import StageSpan
from jllm.models.tensor_parallel.plans import SlicingPlan, has_packed_qkv
from jllm.models.weights.loading import init_stage
from tests.models.tiny import tiny_config


def stage_of(family: str) -> PreTrainedModel:
    import torch

    span = StageSpan(index=0, count=1, first_layer=0, end_layer=4)
    return init_stage(tiny_config(family), span, dtype=torch.float32, seed=1)


@pytest.mark.parametrize(
    ("family", "usual", "styles"),
    [
        ("llama", False, {"self_attn.q_proj": "colwise", "self_attn.o_proj": "rowwise", "input_layernorm": None}),
        # Norms over all heads: transformers gathers before them, so nobody gains from the cut.
        ("olmo2", True, {"self_attn.q_proj": None, "self_attn.o_proj": None, "mlp.up_proj": "colwise"}),
        ("phi3", False, {"self_attn.qkv_proj": "packed_qkv", "self_attn.o_proj": "rowwise",
                         "mlp.gate_up_proj": "packed_colwise", "mlp.down_proj": "rowwise"}),
        ("deepseek_v3", False, {"self_attn.q_b_proj": None, "self_attn.kv_a_proj_with_mqa": None}),
        ("deepseek_v3", True, {"self_attn.q_b_proj": "colwise", "self_attn.kv_a_proj_with_mqa": "mla_kv_a_proj",
                               "self_attn.q_a_proj": None}),
        ("gpt_oss", False, {"self_attn.q_proj": None, "mlp.experts": None}),
        ("gpt_oss", True, {"self_attn.sinks": "colwise", "mlp.experts.down_proj_bias": "added_once",
                           "mlp.router.weight": None}),
    ],
)  # fmt: skip
def test_styles(family: str, usual: bool, styles: dict[str, str | None]) -> None:
    model = stage_of(family)
    plan = SlicingPlan(model, with_usual=usual)
    assert {name: plan.style(f"model.layers.2.{name}") for name in styles} == styles
    assert plan.style("lm_head") is None  # ends are cut by the vocabulary, whatever a plan says
    assert plan.style("model.embed_tokens") is None


def test_packed_maps_of_attention() -> None:
    assert has_packed_qkv(tiny_config("phi3"))
    assert not has_packed_qkv(tiny_config("qwen3"))
