"""A tiny random configuration for any causal model type that transformers lists.

Sizes are shrunk by the names that configurations share; `SPECIAL` holds what a family needs besides.
"""

import inspect
from typing import Any

from transformers import AutoModelForCausalLM
from transformers.configuration_utils import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB = 96
LAYERS = 4

# Names that configurations share → tiny values. Only those that the family's configuration has are used.
SHARED: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "ffn_hidden_size": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "max_position_embeddings": 64,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "sliding_window": 8,
    "query_pre_attn_scalar": 8,
    "num_nextn_predict_layers": 0,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 0,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_dt_rank": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "hidden_dropout_prob": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "dropout": 0.0,
    "activation_dropout": 0.0,
    "embedding_dropout": 0.0,
    "residual_dropout": 0.0,
    "layerdrop": 0.0,
    "layer_drop": 0.0,
    "is_decoder": True,
    "use_cache": False,
}

SPECIAL: dict[str, dict[str, Any]] = {
    "dots3_note_text": {"num_key_value_heads": 4},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]}
            for kind in ("full_attention", "sliding_attention")
        }
    },
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "dbrx": {
        "d_model": 32,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4},
    "hy_v4": {"indexer_types": ["full"] * 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "expand": 2},
    "qwen4_exp_text": {
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
    },
    "xlnet": {"d_head": 8},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
    "longcat_flash": {"num_layers": 4, "num_hidden_layers": 8},
    "phi4_multimodal": {"vision_config": {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}},
}


def causal_types() -> list[str]:
    """Every model type with a causal language model, in transformers' own order."""
    return list(dict.fromkeys(config.model_type for config in AutoModelForCausalLM._model_mapping))


def has_plan(model_type: str) -> bool:
    """Whether the family declares a pipeline plan."""
    return bool(getattr(CONFIG_MAPPING[model_type], "base_model_pp_plan", None))


def tiny_config(model_type: str, *, tied: bool | None = None, **overrides: Any) -> PretrainedConfig:
    """A tiny configuration of a family; `tied=None` keeps the family's default."""
    config_class = CONFIG_MAPPING[model_type]
    known = set(inspect.signature(config_class.__init__).parameters) | set(
        getattr(config_class, "__dataclass_fields__", ())
    )
    known |= set(config_class.attribute_map)
    values = {key: value for key, value in SHARED.items() if key in known}
    if "kv_lora_rank" in values:  # latent attention has as many key heads as query heads
        values |= {"num_key_value_heads": 4} if "num_key_value_heads" in values else {}
    values |= SPECIAL.get(model_type, {})
    if tied is not None:
        values["tie_word_embeddings"] = tied
    return config_class(**(values | overrides))
