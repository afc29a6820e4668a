"""Runs that train adapters, and the same adapters on the whole model in one process, by peft."""

from pathlib import Path
from typing import Any

from tests.distributed.runs import options_of

STEPS = 20
SGD = {"optimizer": "sgd", "learning_rate": 0.2}
ADAMW = {"optimizer": "adamw", "learning_rate": 1e-3, "adam_eps": 1e-4}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def save_model(folder: Path, family: str) -> Path:
    """A tiny model of a family, with random weights."""
    import torch
    from transformers import AutoModelForCausalLM

    from tests.models.tiny import tiny_config

    name, _, tied = family.partition(" ")
    torch.manual_seed(3)
    config = tiny_config(name, tied=bool(tied)) if name == "llama" else tiny_config(name)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def peft_adapter(model: Path, folder: Path, settings: dict[str, Any], **loading: Any) -> Any:
    """An adapter on the whole model, in memory and written by peft, whose second matrices are not 0.

    `loading` is for `from_pretrained`.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **loading)
    adapted = get_peft_model(base, LoraConfig(r=4, task_type="CAUSAL_LM", **{"lora_alpha": 8, **settings})).train()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                parameter.normal_(std=0.05)
    adapted.save_pretrained(folder)
    return adapted


def adapter_in(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return dict(load_file(folder / "adapter_model.safetensors"))


def steps_options(folder: Path, optimizer: dict[str, Any], *, processes: int, stages: int) -> dict[str, Any]:
    """What a run of `STEPS` steps from the adapter in `folder` has beside its model and data: 8 rows a step."""
    return {
        **optimizer,
        "lora": folder / "adapter",
        "gradient_clipping": 0.7,
        "seed": 7,
        "pipe_parallel_size": stages,
        "gradient_accumulation_steps": 4 // (processes // stages),
        "per_device_train_batch_size": 2,
        "max_steps": STEPS,
        "lr_scheduler_type": "constant",
        "output_dir": folder / "out",
        "partition_method": "uniform",
    }


def lora_options(folder: Path, name: str, **more: Any) -> dict[str, Any]:
    """A run of six steps with adapters, its folders below `name`."""
    settings = {
        "lora_dim": 4,
        "learning_rate": 1e-2,
        "adam_eps": 1e-4,
        "lr_scheduler_type": "constant",
        "gradient_accumulation_steps": 4,
        "max_steps": 6,
        "partition_method": "uniform",
        "output_dir": folder / name,
        "checkpoint": folder / f"{name}-ckpt",
    }
    return options_of(folder, settings, **more)
