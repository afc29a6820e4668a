"""What cannot be cut is refused before anything is loaded: by its family, heads, sizes, random numbers and parts."""

from typing import Any

import pytest

from jllm.errors import UserError
from jllm.models.pipeline.costs import estimate_costs
from jllm.models.tensor_parallel.checks import check_tensor_parallel, shared_heads, sharers
from jllm.models.weights.source import causal_class
from tests.models.tiny import tiny_config


@pytest.mark.parametrize(
    ("family", "size", "settings", "says"),
    [
        (
            "inkling_text",
            2,
            {},
            r"model type 'inkling_text' was not shown to train the same in slices \(the gradient of",
        ),
        ("gpt2", 97, {}, "vocab_size 96 leaves nothing for the last process"),
        ("qwen3_moe", 4, {"moe_intermediate_size": 3}, "moe_intermediate_size 3 leaves nothing"),
        ("llama", 3, {}, "does not divide the 4 attention heads; give a divisor of 4"),
        (
            "llama",
            4,
            {"num_attention_heads": 12, "num_key_value_heads": 6, "hidden_size": 48},
            "the 6 key and value heads divide the",
        ),
        ("phi3", 4, {}, "lie in one parameter with the queries and are not shared; give at most 2"),
        ("llama", 4, {"vocab_size": 5}, "vocab_size 5 leaves nothing for the last process"),
        ("qwen2", 2, {"attention_dropout": 0.1}, "attention_dropout is 0.1, and slices draw their own"),
        ("mixtral", 2, {"router_jitter_noise": 0.1}, "router_jitter_noise is 0.1"),
    ],
)
def test_what_cannot_be_cut_is_refused_by_name(family: str, size: int, settings: dict[str, Any], says: str) -> None:
    config = tiny_config(family, **settings)
    with pytest.raises(UserError, match=f"--model_parallel_size {size}.*{says}") as caught:
        check_tensor_parallel(config, causal_class(config), size)
    assert "\n" not in str(caught.value)
    check_tensor_parallel(config, causal_class(config), 1)


def test_heads_that_several_share() -> None:
    config = tiny_config("qwen3", num_attention_heads=8, num_key_value_heads=2)
    assert shared_heads(config) == 2
    assert [sharers(config, size) for size in (1, 2, 4, 8)] == [1, 1, 2, 4]
    assert shared_heads(tiny_config("gpt2")) == 4


def test_a_vocabulary_alone_needs_no_even_heads() -> None:
    config = tiny_config("gpt2")
    check_tensor_parallel(config, causal_class(config), 3)


@pytest.mark.parametrize(
    ("family", "settings", "says"),
    [
        ("olmoe", {"clip_qkv": 1.0}, None),
        ("llama", {"attention_bias": True, "mlp_bias": True}, None),
        ("gpt_oss", {"attention_bias": False}, None),
        ("seed_oss", {"attention_bias": True, "attention_out_bias": True}, None),
        ("phi", {"qk_layernorm": True}, "'phi' with self_attn.[qk]_layernorm.weight in their layers were not shown"),
        ("stablelm", {"qk_layernorm": True}, "'stablelm' with self_attn.[qk]_layernorm.norms.*.weight in their layers"),
    ],
)
def test_layers_with_parts_that_were_not_shown(family: str, settings: dict[str, Any], says: str | None) -> None:
    """A run and its dry run estimate costs before they load: there every parameter is looked up."""
    config = tiny_config(family, **settings)
    if says is None:
        estimate_costs(config, slices=2)
        return
    with pytest.raises(UserError, match=f"--model_parallel_size: models of type {says}"):
        estimate_costs(config, slices=2)
    estimate_costs(config)
