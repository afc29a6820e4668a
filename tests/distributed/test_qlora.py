"""QLoRA on stages trains what transformers, bitsandbytes and peft train in one process."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("peft", reason="peft is not installed: pip install .[adapters]")
pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install .[adapters]")

from tests.distributed.adapted import (
    ADAMW,
    LINEAR,
    SGD,
    STEPS,
    adapter_in,
    lora_options,
    peft_adapter,
    save_model,
    steps_options,
)
from tests.distributed.ranks import Ranks
from tests.distributed.reference import batches_in_order, train_model
from tests.distributed.runs import options_of, records, train_rank
from tests.fixtures import random_rows, write_rows

NF4 = {"load_in_4bit": True}
FP4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}
INT8 = {"load_in_8bit": True}
CASES: dict[str, tuple[str, dict[str, Any], bool, dict[str, Any], dict[str, Any], int, int]] = {
    "NF4, 1 stage, Conv1D maps": (
        "gpt2", NF4, False, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": False}, SGD, 1, 1,
    ),
    "NF4, 2 x 2": ("llama", NF4, False, {"target_modules": LINEAR}, ADAMW, 4, 2),
    "NF4, DoRA": ("llama tied", NF4, False, {"target_modules": LINEAR, "use_dora": True}, SGD, 2, 2),
    "NF4, packed experts frozen": ("qwen3_moe", NF4, False, {"target_modules": ["q_proj", "o_proj"]}, SGD, 2, 2),
    "FP4, 3 stages": ("llama", FP4, False, {"target_modules": LINEAR}, SGD, 3, 3),
    "8 bits": ("llama", INT8, False, {"target_modules": LINEAR}, SGD, 2, 2),
    "a folder in NF4, 3 stages": ("llama tied", NF4, True, {"target_modules": LINEAR}, SGD, 3, 3),
}  # fmt: skip


def bitsandbytes_config(options: dict[str, Any]) -> Any:
    """The same for transformers."""
    import torch
    from transformers import BitsAndBytesConfig

    if "load_in_8bit" in options:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        **{
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.float32,
            **options,
        }
    )


def quantise_experts(model: Any, options: dict[str, Any]) -> None:
    """What bitsandbytes' hook in transformers leaves as it is."""
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.ndim == 3:
                replace_parameter_4bit(module, name, compress_statistics=True, quant_type="nf4")


def train_and_look(options: dict[str, Any]) -> tuple[str | None, str, str]:
    """One rank of a run: what it was refused for, and hashes of the stage's own weights before and after."""
    from jllm.train import setup

    build, seen = setup.build_stage, []

    def look(*arguments: Any, **keywords: Any) -> Any:
        built = build(*arguments, **keywords)
        seen.extend([built.stage.model, frozen_bytes(built.stage.model)])
        return built

    setup.build_stage = look
    refused = train_rank(options)
    return (refused, seen[1], frozen_bytes(seen[0])) if seen else (refused, "", "")


def frozen_bytes(model: Any) -> str:
    """A hash of all weights of a stage but its adapters, and of how to read those that are quantised."""
    import torch

    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if "lora_" not in name:
            found.update(name.encode() + tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("case", CASES)
def test_equals_peft_on_a_quantised_model(ranks: Callable[[int], Ranks], tmp_path: Path, case: str) -> None:
    """Losses and every number of the adapter after 20 steps; the model stays as it is; peft loads the folder."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    family, quantised, is_stored, settings, optimizer, world_size, pipe = CASES[case]
    model = save_model(tmp_path / "model", family)
    data = write_rows(tmp_path / "data", random_rows(22, vocabulary=96, labels=True, packed=True), files=3)
    loading = {"quantization_config": bitsandbytes_config(quantised)}
    if is_stored:
        stored = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **loading)
        model = tmp_path / "stored"
        stored.save_pretrained(model)
        loading = {}
    adapted = peft_adapter(model, tmp_path / "adapter", settings, **loading)
    if "experts" in case:
        quantise_experts(adapted, quantised)
    more = steps_options(tmp_path, optimizer, processes=world_size, stages=pipe) | {"model": model}
    options = options_of(tmp_path, more, **({} if is_stored else quantised))
    options["checkpoint_grad_interval"] = int("experts" in case)
    found = ranks(world_size).run(train_and_look, options)
    assert [refused for refused, _, _ in found] == [None] * world_size
    assert all(before == after != "" for _, before, after in found)
    losses, _ = train_model(adapted, batches_in_order(data, steps=STEPS, global_batch=8, seed=7), options=more)
    own = [record["loss"] for record in records(tmp_path / "out/log")]
    np.testing.assert_allclose(own, losses, rtol=2e-6)
    adapted.save_pretrained(tmp_path / "expected")
    expected, left = adapter_in(tmp_path / "expected"), adapter_in(tmp_path / "out")
    assert expected.keys() == left.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(
            tensor, expected[name], atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **loading)
    if "experts" in case:
        quantise_experts(base, quantised)
    # In an evaluation bitsandbytes has another kernel on some processors, for larger matrices.
    again, ids = PeftModel.from_pretrained(base, tmp_path / "out").train(), torch.arange(3, 15)[None]
    torch.testing.assert_close(again(ids).logits, adapted(ids).logits, atol=1e-3, rtol=1e-3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(tmp_path / "model", "llama tied")
    write_rows(tmp_path / "data", random_rows(22, vocabulary=96, labels=True), files=3)
    return tmp_path


def test_going_on(ranks: Callable[[int], Ranks], folder: Path) -> None:
    """The checkpoint has adapters alone. On as many stages the run goes on bit by bit; beside other weights, not."""
    from safetensors import safe_open

    more = {**NF4, "checkpoint_grad_interval": 1}
    assert ranks(2).run(train_rank, lora_options(folder, "whole", steps_per_checkpoint=3, **more)) == [None, None]
    saved = folder / "whole-ckpt/step-00000003"
    names = [name for path in saved.glob("rank-*") for name in safe_open(path, "np").keys()]  # noqa: SIM118
    assert names
    assert all("lora_" in name or "rng" in name for name in names)
    # Without recomputation, which changes nothing.
    again = {**NF4, "resume_ckpt": str(saved), "checkpoint": None, "log_dir": folder / "log"}
    assert ranks(2).run(train_rank, lora_options(folder, "again", **again)) == [None, None]
    whole = adapter_in(folder / "whole")
    assert all((tensor == whole[name]).all() for name, tensor in adapter_in(folder / "again").items())
    refused = ranks(2).run(train_rank, lora_options(folder, "again", **again | {"load_in_4bit": False}))
    message = (
        "the model was in 4 bits (nf4, scales quantised too) in the checkpoint's run and is not quantised now; give"
    )
    assert all(str(line).startswith(message) for line in refused), refused


def test_adapters_of_a_checkpoint_beside_the_model(ranks: Callable[[int], Ranks], folder: Path) -> None:
    """`--from_ckpt` has the adapters; the model, which is not in it, is read as it is, in 4 bits too."""
    more = {**NF4, "max_steps": 2, "checkpoint": folder / "first"}
    assert ranks(2).run(train_rank, lora_options(folder, "whole", **more)) == [None, None]
    begun = {**NF4, "max_steps": 1, "learning_rate": 0.0, "checkpoint": None}
    from_checkpoint = {"from_ckpt": folder / "first", "log_dir": folder / "log"}
    assert ranks(2).run(train_rank, lora_options(folder, "again", **begun, **from_checkpoint)) == [None, None]
    from_adapter = {"lora": folder / "whole", "lora_dim": None, "log_dir": folder / "log-adapter"}
    assert ranks(2).run(train_rank, lora_options(folder, "other", **begun, **from_adapter)) == [None, None]
    [[first], [second]] = [records(folder / name) for name in ("log", "log-adapter")]
    assert first["loss"] == second["loss"]


def test_adapters_in_bf16(ranks: Callable[[int], Ranks], folder: Path) -> None:
    """With fp32 masters, shared over two pipelines; the bytes of the model stay as they are."""
    more = {**NF4, "precision": "bf16", "lora_dtype": "bf16", "gradient_accumulation_steps": 2, "checkpoint": None}
    found = ranks(4).run(train_and_look, lora_options(folder, "out", **more, log_dir=folder / "log"))
    assert [refused for refused, _, _ in found] == [None] * 4
    assert all(before == after != "" for _, before, after in found)
    losses = [record["loss"] for record in records(folder / "log")]
    assert losses[-1] < losses[0]
    assert {str(tensor.dtype) for tensor in adapter_in(folder / "out").values()} == {"torch.bfloat16"}
