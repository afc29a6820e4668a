"""Options of adapters: what is refused together, and what people are told."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft", reason="peft is not installed: pip install .[adapters]")

from jllm.errors import UserError
from jllm.models.weights.source import causal_class
from jllm.train.adapters import find_adapters
from jllm.train.config import TrainConfig
from tests.models.tiny import tiny_config


def config(**more: Any) -> TrainConfig:
    return TrainConfig(**{"model": Path("model"), "train_data": ("data",), **more})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"lora_alpha": 2.0}, "--lora_alpha is an option of LoRA adapters; give --lora_dim or --lora too, or drop it"),
        ({"use_dora": True}, "--use_dora is an option of LoRA adapters"),
        ({"only_ckpt_lora": True}, "--only_ckpt_lora is an option of LoRA adapters"),
        ({"lora_dim": 4, "lora": Path("a")}, "--lora_dim and --lora: what the adapter a is stays as it is; drop one"),
        ({"lora": Path("a"), "use_dora": True}, "--use_dora and --lora: what the adapter a is stays as it is"),
        ({"lora_dim": 0}, "--lora_dim 0: it must be at least 1"),
        ({"lora_dim": 4, "target_modules": "q_proj"}, "--target_modules chooses among the model's own parameters"),
        ({"lora_dim": 4, "layers_to_transform": "0"}, "--layers_to_transform chooses among the model's own parameters"),
        ({"lora_dim": 4, "only_ckpt_model": True}, "--only_ckpt_model writes the model, which adapters leave as it is"),
        ({"lora_dim": 4, "only_optimize_lora": False}, "--no_only_optimize_lora: adapters are trained on a"),
        ({"lora_dim": 4, "router_aux_loss_coef": 0.1}, "--router_aux_loss_coef 0.1 trains routers, which are frozen"),
        ({"lora_dim": 4, "lora_dtype": "bf16", "precision": "fp32"}, "--lora_dtype bf16 with --precision fp32"),
        ({"lora_dim": 4, "lora_dtype": "fp32", "precision": "fp16"}, "--lora_dtype fp32 with --precision fp16"),
        ({"lora_dim": 4, "modules_to_save": "lm_head"}, "--modules_to_save are trained in the model's type, bf16"),
        ({"lora_dim": 4, "lora_dtype": "bf16", "zero_stage": 0}, "--zero_stage 0 with --precision bf16"),
        ({"lora_dim": 4, "loraplus_lr_ratio": 0.0}, "--loraplus_lr_ratio 0.0: it must be above 0"),
        (
            {"lora_dim": 4, "only_ckpt_lora": True, "checkpoint": Path("c"), "resume_ckpt": "auto"},
            "--only_ckpt_lora leaves nothing to resume from",
        ),
    ],
)  # fmt: skip
def test_what_does_not_go_together(more: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refused:
        config(**more)
    assert str(refused.value).startswith(message)


def test_types_that_adapters_are_kept_in() -> None:
    """fp32 beside a bf16 model needs no masters, and so no ZeRO."""
    assert config(lora_dim=4).trained_precision == "fp32"
    assert config(lora_dim=4).resolved_zero_stage == 0
    assert config(lora_dim=4, lora_dtype="bf16").resolved_zero_stage == 1
    assert config(lora_dim=4, precision="fp16").trained_precision == "fp16"
    assert config().trained_precision == "bf16"


def test_the_names_of_older_tools() -> None:
    from click.testing import CliRunner

    from jllm.commands.train_pipe import main

    line = ["--model", "m", "--train_data", "d", "--lora_dim", "4", "--lora_module_name", "q_proj"]
    result = CliRunner().invoke(main, [*line, "--no_only_optimize_lora"])
    assert result.exit_code == 2
    assert "adapters are trained on a frozen model" in result.output


def test_what_is_said() -> None:
    origin = tiny_config("qwen3_moe")
    found = find_adapters(config(lora_dim=4), origin, causal_class(origin))
    assert found is not None
    first, *rest = found.said()
    assert first.startswith("LoRA of rank 4, alpha 4, on")
    assert len(rest) == 1
    assert "packed experts" in rest[0]
    assert find_adapters(config(), origin, causal_class(origin)) is None


def test_dora_multiplies_in_its_own_type() -> None:
    llama = tiny_config("llama")
    with pytest.raises(UserError, match=r"^--use_dora and --lora_compute model: DoRA's norms need"):
        find_adapters(config(lora_dim=4, use_dora=True, lora_compute="model"), llama, causal_class(llama))
    assert find_adapters(config(lora_dim=4, use_dora=True), llama, causal_class(llama)) is not None


def test_the_type_that_adapters_multiply_in_is_said() -> None:
    """Where it is not their own: on CPU `auto` is."""
    llama = tiny_config("llama")

    def said(**more: Any) -> str:
        found = find_adapters(config(lora_dim=4, **more), llama, causal_class(llama))
        assert found is not None
        return "\n".join(found.said())

    assert "adapters are fp32, and multiply in bf16 (--lora_compute adapter: in fp32)" in said(lora_compute="model")
    for more in ({}, {"lora_compute": "adapter"}, {"lora_compute": "model", "precision": "fp32"}):
        assert "multiply" not in said(**more)
