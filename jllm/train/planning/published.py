"""Shapes of well-known models, for plans without their files: as their publishers' configurations have them."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from jllm.errors import UserError, did_you_mean
from jllm.models.weights.source import read_config

_LLAMA_3: dict[str, Any] = {"model_type": "llama", "vocab_size": 128_256, "num_key_value_heads": 8, "head_dim": 128}
_QWEN_3: dict[str, Any] = {"model_type": "qwen3", "vocab_size": 151_936, "num_key_value_heads": 8, "head_dim": 128}
_MIXTRAL: dict[str, Any] = {"model_type": "mixtral", "num_key_value_heads": 8, "num_local_experts": 8}


def _shape(of: dict[str, Any], *, hidden: int, inner: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": inner}
    return {
        **of,
        **sizes,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "tie_word_embeddings": False,
        **more,
    }


PUBLISHED: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": _shape(
        _LLAMA_3, hidden=2048, inner=8192, layers=16, heads=32, head_dim=64, tie_word_embeddings=True
    ),
    "llama-3.2-3b": _shape(_LLAMA_3, hidden=3072, inner=8192, layers=28, heads=24, tie_word_embeddings=True),
    "llama-3-8b": _shape(_LLAMA_3, hidden=4096, inner=14_336, layers=32, heads=32),
    "llama-3-70b": _shape(_LLAMA_3, hidden=8192, inner=28_672, layers=80, heads=64),
    "qwen3-1.7b": _shape(_QWEN_3, hidden=2048, inner=6144, layers=28, heads=16, tie_word_embeddings=True),
    "qwen3-8b": _shape(_QWEN_3, hidden=4096, inner=12_288, layers=36, heads=32),
    "qwen3-14b": _shape(_QWEN_3, hidden=5120, inner=17_408, layers=40, heads=40),
    "qwen3-32b": _shape(_QWEN_3, hidden=5120, inner=25_600, layers=64, heads=64),
    "mistral-7b": _shape(
        {"model_type": "mistral", "vocab_size": 32_000, "num_key_value_heads": 8, "sliding_window": None},
        hidden=4096,
        inner=14_336,
        layers=32,
        heads=32,
    ),
    "mixtral-8x7b": _shape(_MIXTRAL, hidden=4096, inner=14_336, layers=32, heads=32, vocab_size=32_000),
    "mixtral-8x22b": _shape(_MIXTRAL, hidden=6144, inner=16_384, layers=56, heads=48, vocab_size=32_768),
}
"""Name → what the configuration has."""


def model_config(model: str, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration of a model folder, or of a published shape.

    Raises:
        UserError: neither; or the folder's configuration cannot be read.
    """
    known = PUBLISHED.get(model.lower())
    if known is not None and not Path(model).exists():
        return AutoConfig.for_model(**known)
    if known is None and not Path(model).is_dir():
        names = ", ".join(PUBLISHED)
        near = did_you_mean(model.lower(), PUBLISHED)
        raise UserError(
            f"--model {model}: no such folder, and no published shape{near}; give a folder, or one of {names}"
        )
    return read_config(Path(model), trust_remote_code=trust_remote_code)
