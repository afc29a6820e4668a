"""LoRA on stages trains what peft trains on the whole model in one process, from a folder that peft wrote."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("peft", reason="peft is not installed: pip install .[adapters]")

from tests.distributed.ranks import Ranks
from tests.distributed.reference import batches_in_order, train_model
from tests.distributed.runs import options_of, records, train_rank
from tests.fixtures import random_rows, write_rows

STEPS = 20
SGD = {"optimizer": "sgd", "learning_rate": 0.2}
ADAMW = {"optimizer": "adamw", "learning_rate": 1e-3, "adam_eps": 1e-4}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], int, int]] = {
    "tied, 2 stages": ("llama tied", {"target_modules": LINEAR}, SGD, 2, 2),
    "2 x 2": ("llama", {"target_modules": LINEAR}, ADAMW, 4, 2),
    "one layer alone, DoRA": (
        "llama tied", {"target_modules": LINEAR, "layers_to_transform": [0], "use_dora": True}, SGD, 2, 2,
    ),
    "rsLoRA and the head": (
        "llama", {"target_modules": ["q_proj", "lm_head"], "use_rslora": True, "lora_alpha": 3}, SGD, 2, 2,
    ),
    "tied head": ("llama tied", {"target_modules": ["q_proj", "lm_head"]}, SGD, 2, 2),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "v_proj"]}, SGD | {"learning_rate": 0.02}, 2, 2),
    "packed experts": (
        "qwen3_moe",
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
        SGD, 2, 2,
    ),
    "head trained whole": ("llama tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, SGD, 2, 2),
    "transposed maps": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}, SGD, 2, 2),
}  # fmt: skip


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


def peft_adapter(model: Path, folder: Path, settings: dict[str, Any]) -> Any:
    """An adapter on the whole model, in memory and written by peft, whose second matrices are not 0."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
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


@pytest.mark.parametrize("case", CASES)
def test_equals_peft(ranks: Callable[[int], Ranks], tmp_path: Path, case: str) -> None:
    """Losses, gradient norms, and every number of the adapter after 20 steps; peft loads the folder that is left."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    family, settings, optimizer, world_size, pipe = CASES[case]
    model = save_model(tmp_path / "model", family)
    data = write_rows(tmp_path / "data", random_rows(22, vocabulary=96, labels=True, packed=True), files=3)
    adapted = peft_adapter(model, tmp_path / "adapter", settings)
    more = {
        **optimizer,
        "lora": tmp_path / "adapter",
        "gradient_clipping": 0.7,
        "seed": 7,
        "pipe_parallel_size": pipe,
        "gradient_accumulation_steps": 4 // (world_size // pipe),
        "per_device_train_batch_size": 2,
        "max_steps": STEPS,
        "lr_scheduler_type": "constant",
        "output_dir": tmp_path / "out",
        "partition_method": "uniform",
    }
    assert ranks(world_size).run(train_rank, options_of(tmp_path, **more)) == [None] * world_size
    batches = batches_in_order(data, steps=STEPS, global_batch=8, seed=7)
    losses, norms = train_model(adapted, batches, options=more)
    found = records(tmp_path / "out/log")
    np.testing.assert_allclose([record["loss"] for record in found], losses, rtol=1e-6)
    np.testing.assert_allclose([record["grad_norm"] for record in found], norms, rtol=1e-4)
    adapted.save_pretrained(tmp_path / "expected")
    expected, left = adapter_in(tmp_path / "expected"), adapter_in(tmp_path / "out")
    # Beside an adapter on the embedding or the head peft stores the base's own tensor.
    assert expected.keys() - left.keys() == {name for name in expected if ".base_layer.weight" in name}
    for name, tensor in left.items():
        torch.testing.assert_close(
            tensor, expected[name], atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = torch.arange(3, 15)[None]
    again = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    torch.testing.assert_close(again(ids).logits, adapted.eval()(ids).logits, atol=1e-4, rtol=1e-4)
