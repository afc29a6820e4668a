"""Models in few bits as transformers and bitsandbytes make them."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from jllm.models.weights.quantisation import Quantisation


def for_transformers(how: Quantisation, **more: Any) -> BitsAndBytesConfig:
    """What transformers is told."""
    if how.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, **more)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        **{
            "bnb_4bit_quant_type": how.kind,
            "bnb_4bit_use_double_quant": how.double,
            "bnb_4bit_compute_dtype": torch.float32,
            **more,
        },
    )


def whole(folder: Path, how: Quantisation, **more: Any) -> PreTrainedModel:
    """The model, in fp32 but for what is quantised."""
    config = for_transformers(how, **more)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
