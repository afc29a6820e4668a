"""Tiny models of any family, and adapters on them that peft wrote, none of whose matrices is 0."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.models.tiny import VOCAB, tiny_config

IDS = torch.arange(3, 3 + 24).reshape(2, 12) % VOCAB


def save_model(folder: Path, family: str, *, tied: bool | None = None, seed: int = 3, **settings: Any) -> Path:
    """A tiny model of a family, with random weights."""
    torch.manual_seed(seed)
    dtype = settings.pop("dtype", torch.float32)
    shard = settings.pop("max_shard_size", "5GB")
    model = AutoModelForCausalLM.from_config(tiny_config(family, tied=tied, **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(std=0.2)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def save_adapter(model: Path, folder: Path, *, dtype: torch.dtype = torch.float32, **settings: Any) -> PeftModel:
    """An adapter on the whole model: in memory, on evaluation, and written by peft."""
    torch.manual_seed(11)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    config = LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 8, **settings})
    adapted = get_peft_model(base, config, autocast_adapter_dtype=True)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.normal_(std=0.1)
            elif parameter.requires_grad:
                parameter.mul_(1.1)
    adapted.save_pretrained(str(folder))
    return adapted.eval()


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    """What a model says, in fp32."""
    found: Tensor = model(ids, use_cache=False).logits.float()
    return found


def logits_of(folder: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    """What plain transformers makes of a folder."""
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval())
