"""`jllm adapter to_gguf`: a LoRA adapter as a GGUF file, which llama.cpp loads over its own file of the model.

A factor pair becomes `NAME.lora_a` [rank, inputs] and `NAME.lora_b` [outputs, rank], NAME being what llama.cpp calls
the weight. Where llama.cpp keeps the rows of q and k in another order (Llama and what shares its layout: the pairs of
a rotation beside each other, not half a head apart), B's rows are put into it too. There is one alpha for the whole
file; ranks and scalings that differ are put into B.

Guarantees: each family below was compared with peft in llama.cpp itself (tests/models/adapters/test_gguf_export.py);
others are refused by name, and so is what llama.cpp has no place for. The file is there completely or not at all.
Cost: the adapter in host memory; the model's configuration, no weight of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PretrainedConfig

from jllm import atomic
from jllm.errors import UserError, did_you_mean
from jllm.models.adapters.low_rank import LowRank, read_changes
from jllm.models.pipeline.structure import count_layers
from jllm.models.weights.dequantised import plain_configuration
from jllm.models.weights.rewritten import config_of, raw_config
from jllm.models.weights.source import bare_model, causal_class

FAMILIES: dict[str, tuple[str, bool]] = {
    "gemma2": ("gemma2", False),
    "gpt2": ("gpt2", False),
    "granite": ("granite", True),
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "olmo2": ("olmo2", False),
    "phi3": ("phi3", False),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
    "smollm3": ("smollm3", True),
    "starcoder2": ("starcoder2", False),
}
"""Model type → llama.cpp's name of the architecture, and whether it has the rows of q and k in an order of its own."""
DTYPES = {"f32": np.float32, "f16": np.float16}
USER = "a GGUF adapter"


@dataclass(frozen=True, kw_only=True)
class WrittenAdapter:
    """What came of it.

    Attributes:
        architecture: by llama.cpp's name.
        modules: with a pair of factors.
    """

    architecture: str
    modules: int


def to_gguf(adapter: Path, base: Path, output: Path, *, dtype: str = "f32") -> WrittenAdapter:
    """Write `output`.

    Args:
        adapter: a peft folder.
        base: the Hugging Face folder of its model, of which the configuration is read.
        output: the file.
        dtype: of the factors, one of `DTYPES`.

    Raises:
        UserError: the family is none of `FAMILIES`, the adapter does not fit the model, or has what llama.cpp has not.
    """
    _, raw = plain_configuration(raw_config(base), base, with_weights=False)
    origin = config_of(raw)
    family = causal_class(origin)
    if origin.model_type not in FAMILIES:
        raise UserError(
            f"{base}: adapters of {origin.model_type!r} models cannot be written as GGUF;"
            f"{did_you_mean(origin.model_type, FAMILIES)} this works for {', '.join(FAMILIES)}"
        )
    changes = read_changes(adapter, origin, family, user=USER)
    if (found := changes.unlike_sums()) is not None:
        raise UserError(f"--lora {adapter}: llama.cpp has no place for {found}; merge it into its model instead")
    tied = bare_model(origin, family, dtype=torch.float32).all_tied_weights_keys
    if touched := changes.low_rank.keys() & {*tied, *tied.values()}:
        raise UserError(
            f"--lora {adapter}: {min(touched)} is head and embedding in one, on which llama.cpp has no adapters; merge"
            " it into its model instead"
        )
    architecture, _ = FAMILIES[origin.model_type]
    alpha = float(changes.config.lora_alpha)
    with atomic.replacing(output) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        for name, values in _tensors(changes.low_rank, origin, alpha):
            writer.add_tensor(name, values.astype(DTYPES[dtype]))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return WrittenAdapter(architecture=architecture, modules=len(changes.low_rank))


def _tensors(
    changes: dict[str, LowRank], origin: PretrainedConfig, alpha: float
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Names and values, in the order of the names."""
    architecture, is_permuted = FAMILIES[origin.model_type]
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, count_layers(origin))
    for parameter, change in sorted(changes.items()):
        name = names.get_name(parameter, try_suffixes=(".weight",))
        if name is None or change.left.ndim != 2:
            raise UserError(
                f"{parameter}: llama.cpp has no place for an adapter there; merge it into its model instead"
            )
        is_embedding = parameter.endswith(("embed_tokens.weight", "wte.weight"))
        # A weight that lies the other way round, as GPT-2's do, is transposed in llama.cpp; an embedding is not.
        is_turned = change.by_column and not is_embedding
        outputs, inputs = (change.right.T, change.left.T) if is_turned else (change.left, change.right)
        rank = inputs.shape[0]
        factor = change.scaling * rank / alpha
        if is_embedding:  # whose rows llama.cpp takes out of the first factor: [ids, rank] and [width, rank]
            first, second = outputs, inputs.T * factor
        else:
            if is_permuted and (heads := _heads(parameter, origin)):
                outputs = permuted(outputs, heads)
            first, second = inputs, outputs * factor
        yield f"{name}.lora_a", first.contiguous().numpy()
        yield f"{name}.lora_b", second.contiguous().numpy()


def _heads(parameter: str, origin: PretrainedConfig) -> int | None:
    """How many heads the rows of a weight are of, where llama.cpp has these in its own order."""
    if parameter.endswith(".q_proj.weight"):
        return int(origin.num_attention_heads)
    if parameter.endswith(".k_proj.weight"):
        return int(origin.num_key_value_heads)
    return None


def permuted(rows: Tensor, heads: int) -> Tensor:
    """Rows [outputs, ...] of rotated heads in llama.cpp's order: the halves of each head interleaved."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
