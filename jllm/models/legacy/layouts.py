"""Older published layouts: what their configuration means, and which tensor of ours each of theirs becomes.

    qwen        Qwen-1                  → Qwen2   packed query-key-value with bias; w2 is the gate, w1 goes up
    internlm2   InternLM2, 2.5          → Llama   query, key and value packed per group of heads
    baichuan    Baichuan 7B, 2-7B       → Llama   packed query-key-value
                Baichuan 13B, 2-13B     → Llama with ALiBi in place of rotary positions (`jllm.models.legacy.alibi`)

Baichuan2's head multiplies with its rows scaled to length 1. For 7B the scaled rows are what is loaded, so the logits
are the published ones, and training then treats them as an ordinary head. 13B keeps the scaling, in training too: it
goes back to its published layout, whose code scales.

Nothing published is run: no remote code, only tensors and config.json. What a configuration asks for beyond what is
known here is refused.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, PretrainedConfig, Qwen2Config

from jllm.errors import UserError
from jllm.models.legacy.alibi import AlibiLlamaConfig

# Ours → how to make it from theirs; None where the tensor is not one of ours (a stored rotary table).
Targets = dict[str, Callable[[Tensor], Tensor]]


@dataclass(frozen=True, kw_only=True)
class PublishedLayout:
    """One published layout."""

    name: str
    """For messages."""
    read_config: Callable[[dict[str, Any]], PretrainedConfig]
    targets: Callable[[str, PretrainedConfig, dict[str, Any]], Targets]
    """Published tensor name → our tensors made from it."""


def layout_of(raw_config: dict[str, Any]) -> PublishedLayout | None:
    """The layout of a published config.json, if it is one of these."""
    return LAYOUTS.get(str(raw_config.get("model_type")))


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _rows(index: int, parts: int) -> Callable[[Tensor], Tensor]:
    """One of `parts` equal groups of rows; of a weight or of a bias."""
    return lambda tensor: tensor.chunk(parts, dim=0)[index]


def _renamed(name: str, table: dict[str, str]) -> str | None:
    """`name` with the first matching pattern of `table` replaced."""
    for pattern, replacement in table.items():
        found = re.fullmatch(pattern, name)
        if found is not None:
            return found.expand(replacement)
    return None


def _unit_rows(tensor: Tensor) -> Tensor:
    scaled: Tensor = torch.nn.functional.normalize(tensor.float())
    return scaled.to(tensor.dtype)


def _refuse(layout: str, key: str, value: object, allowed: str) -> UserError:
    return UserError(
        f"config.json of this {layout} checkpoint has {key} {value!r}; only {allowed} is known here: "
        "convert the checkpoint with its own tools first"
    )


def _shared(layout: str, raw: dict[str, Any]) -> dict[str, Any]:
    """Fields that go by one name everywhere; ids of special tokens are those of the file, absent ones absent."""
    if quantised := raw.get("quantization_config"):
        raise _refuse(layout, "quantization_config", quantised, "none (plain weights)")
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "initializer_range")
    kept: dict[str, Any] = {key: raw[key] for key in sizes if key in raw}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        kept[key] = raw.get(key)
    kept["tie_word_embeddings"] = bool(raw.get("tie_word_embeddings", False))
    return kept


# Qwen-1


# What the published code would do otherwise than Qwen2 → the value with which it does the same.
_QWEN_ONLY: dict[str, object] = {
    "rotary_pct": 1.0,
    "no_bias": True,
    "scale_attn_weights": True,
    "apply_residual_connection_post_layernorm": False,
    "emb_dropout_prob": 0.0,
}


def _qwen_config(raw: dict[str, Any]) -> PretrainedConfig:
    for key, known in _QWEN_ONLY.items():
        if raw.get(key, known) != known:
            raise _refuse("Qwen", key, raw[key], json.dumps(known))
    for key in ("visual", "audio"):
        if raw.get(key) is not None:
            raise UserError(
                f"config.json of this Qwen checkpoint has a part {key!r} (Qwen-VL, Qwen-Audio); only "
                "the language model alone is known here: give a checkpoint of that"
            )
    heads, width = raw["num_attention_heads"], raw["hidden_size"]
    size = raw.get("kv_channels") or 128  # the default of the published code
    if size * heads != width:
        given = repr(size) if raw.get("kv_channels") else f"left out ({size}, then)"
        raise UserError(
            f"config.json of this Qwen model has kv_channels {given} and {heads} heads in a hidden_size of {width}; "
            f"only hidden_size / num_attention_heads ({width / heads:g}) is known here: give the published file"
        )
    return Qwen2Config(
        **_shared("Qwen", raw),
        num_key_value_heads=raw["num_attention_heads"],
        intermediate_size=raw["intermediate_size"] // 2,  # published: both halves of the gated layer together
        rms_norm_eps=raw.get("layer_norm_epsilon", 1e-6),
        # Beyond this length the published code stretches positions while generating; training stays below it.
        max_position_embeddings=raw.get("seq_length") or raw.get("max_position_embeddings", 8192),
        rope_parameters={"rope_type": "default", "rope_theta": float(raw.get("rotary_emb_base", 10_000))},
        attention_dropout=raw.get("attn_dropout_prob", 0.0),
        use_sliding_window=False,
    )


_QWEN_NAMES = {
    r"transformer\.wte\.weight": "model.embed_tokens.weight",
    r"transformer\.ln_f\.weight": "model.norm.weight",
    r"lm_head\.weight": "lm_head.weight",
    r"transformer\.h\.(\d+)\.ln_1\.weight": r"model.layers.\1.input_layernorm.weight",
    r"transformer\.h\.(\d+)\.ln_2\.weight": r"model.layers.\1.post_attention_layernorm.weight",
    r"transformer\.h\.(\d+)\.attn\.c_proj\.weight": r"model.layers.\1.self_attn.o_proj.weight",
    r"transformer\.h\.(\d+)\.mlp\.w1\.weight": r"model.layers.\1.mlp.up_proj.weight",
    r"transformer\.h\.(\d+)\.mlp\.w2\.weight": r"model.layers.\1.mlp.gate_proj.weight",
    r"transformer\.h\.(\d+)\.mlp\.c_proj\.weight": r"model.layers.\1.mlp.down_proj.weight",
}


def _qwen_targets(name: str, config: PretrainedConfig, raw: dict[str, Any]) -> Targets:
    if found := re.fullmatch(r"transformer\.h\.(\d+)\.attn\.c_attn\.(weight|bias)", name):
        prefix = f"model.layers.{found[1]}.self_attn"
        return {f"{prefix}.{part}_proj.{found[2]}": _rows(index, 3) for index, part in enumerate("qkv")}
    renamed = _renamed(name, _QWEN_NAMES)
    return {renamed: _same} if renamed else {}


# InternLM2


def _internlm2_config(raw: dict[str, Any]) -> PretrainedConfig:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(raw.get("rope_theta", 10_000))}
    if scaling := raw.get("rope_scaling"):
        kind = scaling.get("type") or scaling.get("rope_type")
        if kind not in ("dynamic", "linear"):
            raise _refuse("InternLM2", "rope_scaling", kind, "dynamic or linear")
        rope |= {"rope_type": kind, "factor": scaling["factor"]}
    return LlamaConfig(
        **_shared("InternLM2", raw),
        num_key_value_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
        intermediate_size=raw["intermediate_size"],
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
        max_position_embeddings=raw.get("max_position_embeddings", 2048),
        rope_parameters=rope,
        attention_bias=bool(raw.get("bias", False)),
        hidden_act=raw.get("hidden_act", "silu"),
    )


_INTERNLM2_NAMES = {
    r"model\.tok_embeddings\.weight": "model.embed_tokens.weight",
    r"model\.norm\.weight": "model.norm.weight",
    r"output\.weight": "lm_head.weight",
    r"model\.layers\.(\d+)\.attention_norm\.weight": r"model.layers.\1.input_layernorm.weight",
    r"model\.layers\.(\d+)\.ffn_norm\.weight": r"model.layers.\1.post_attention_layernorm.weight",
    r"model\.layers\.(\d+)\.attention\.wo\.(weight|bias)": r"model.layers.\1.self_attn.o_proj.\2",
    r"model\.layers\.(\d+)\.feed_forward\.w1\.weight": r"model.layers.\1.mlp.gate_proj.weight",
    r"model\.layers\.(\d+)\.feed_forward\.w2\.weight": r"model.layers.\1.mlp.down_proj.weight",
    r"model\.layers\.(\d+)\.feed_forward\.w3\.weight": r"model.layers.\1.mlp.up_proj.weight",
}


def _internlm2_targets(name: str, config: PretrainedConfig, raw: dict[str, Any]) -> Targets:
    found = re.fullmatch(r"model\.layers\.(\d+)\.attention\.wqkv\.(weight|bias)", name)
    if found is None:
        renamed = _renamed(name, _INTERNLM2_NAMES)
        return {renamed: _same} if renamed else {}
    groups = config.num_attention_heads // config.num_key_value_heads
    size = config.hidden_size // config.num_attention_heads

    def take(start: int, end: int) -> Callable[[Tensor], Tensor]:
        # Published rows: for each key head its query heads, then the key, then the value.
        def rows(tensor: Tensor) -> Tensor:
            grouped = tensor.view(config.num_key_value_heads, groups + 2, size, *tensor.shape[1:])
            return grouped[:, start:end].flatten(0, 2)

        return rows

    prefix = f"model.layers.{found[1]}.self_attn"
    return {
        f"{prefix}.q_proj.{found[2]}": take(0, groups),
        f"{prefix}.k_proj.{found[2]}": take(groups, groups + 1),
        f"{prefix}.v_proj.{found[2]}": take(groups + 1, groups + 2),
    }


# Baichuan


def _baichuan_config(raw: dict[str, Any]) -> PretrainedConfig:
    # The 13B models have no table of positions, and say only how long they were trained on.
    has_rotary = "max_position_embeddings" in raw
    fields = {
        **_shared("Baichuan", raw),
        "num_key_value_heads": raw["num_attention_heads"],
        "intermediate_size": raw["intermediate_size"],
        "rms_norm_eps": raw.get("rms_norm_eps", 1e-6),
        "max_position_embeddings": raw["max_position_embeddings"] if has_rotary else raw.get("model_max_length", 4096),
        "hidden_act": raw.get("hidden_act", "silu"),
    }
    return LlamaConfig(**fields) if has_rotary else AlibiLlamaConfig(**fields, normalised_head=has_normalised_head(raw))


def published_config(config: AlibiLlamaConfig, source: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """config.json of a 13B model in its published form, with what else `source` had (its code's names)."""
    fields = {
        "architectures": ["BaichuanForCausalLM"],
        **source,
        "model_type": "baichuan",
        "torch_dtype": str(dtype).removeprefix("torch."),
        "model_max_length": config.max_position_embeddings,
        **{
            key: getattr(config, key)
            for key in (
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "rms_norm_eps",
                "hidden_act",
                "initializer_range",
                "bos_token_id",
                "eos_token_id",
                "pad_token_id",
                "tie_word_embeddings",
            )
        },
    }
    return fields | ({"z_loss_weight": fields.get("z_loss_weight", 0)} if config.normalised_head else {})


def has_normalised_head(raw: dict[str, Any]) -> bool:
    """Baichuan2, whose configuration differs from Baichuan's by a loss that only its training used."""
    return "z_loss_weight" in raw or raw.get("vocab_size") == 125_696


def _baichuan_targets(name: str, config: PretrainedConfig, raw: dict[str, Any]) -> Targets:
    if found := re.fullmatch(r"(model\.layers\.\d+\.self_attn)\.W_pack\.weight", name):
        return {f"{found[1]}.{part}_proj.weight": _rows(index, 3) for index, part in enumerate("qkv")}
    if name == "lm_head.weight" and has_normalised_head(raw) and not isinstance(config, AlibiLlamaConfig):
        return {name: _unit_rows}
    return {} if "rotary_emb" in name else {name: _same}


LAYOUTS = {
    "qwen": PublishedLayout(name="Qwen-1", read_config=_qwen_config, targets=_qwen_targets),
    "internlm2": PublishedLayout(name="InternLM2", read_config=_internlm2_config, targets=_internlm2_targets),
    "baichuan": PublishedLayout(name="Baichuan", read_config=_baichuan_config, targets=_baichuan_targets),
}
