"""A model of a Hugging Face folder as a GGUF file in fp32, for llama.cpp, without a vocabulary: ids go in and come out.

The layout is llama.cpp's: weights by its names, rows of q and k in its order for families that share Llama's layout,
Conv1D maps the other way round, and norms with their 1 where a family leaves it out.
"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM

from jllm.models.adapters.gguf_export import FAMILIES, permuted

GPT2_TURNED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def write_base(folder: Path, path: Path) -> Path:
    """Write the model in `folder` to `path`."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = model.config
    architecture, is_permuted = FAMILIES[config.model_type]
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(64)
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    is_gpt2 = config.model_type == "gpt2"
    inner = (config.n_inner or 4 * config.hidden_size) if is_gpt2 else config.intermediate_size
    writer.add_feed_forward_length(inner)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    if hasattr(config, "head_dim") and config.head_dim:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if not is_gpt2:
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_rope_dimension_count(
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
    epsilon = next(v for n in ("rms_norm_eps", "norm_epsilon", "layer_norm_epsilon") if (v := getattr(config, n, None)))
    writer.add_layer_norm_rms_eps(epsilon)
    writer.add_layer_norm_eps(epsilon)
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if config.model_type == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    writer.add_tokenizer_model("none")
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        value = tensor.clone()
        if is_permuted and name.endswith(("q_proj.weight", "q_proj.bias")):
            value = permuted(value, config.num_attention_heads)
        if is_permuted and name.endswith(("k_proj.weight", "k_proj.bias")):
            value = permuted(value, config.num_key_value_heads)
        if is_gpt2 and name.endswith(GPT2_TURNED):
            value = value.T.contiguous()
        if config.model_type == "gemma2" and name.endswith("norm.weight"):
            value += 1
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, name
        writer.add_tensor(found, value.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
