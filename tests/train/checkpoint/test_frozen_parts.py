"""What adapters were trained beside: the same model, held in the same way, or the run is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from jllm.errors import UserError
from jllm.train.checkpoint.frozen_parts import check_same_adapters, check_same_frozen_parts, frozen_parts
from jllm.train.config import TrainConfig, resolved_options
from tests.models.tiny import tiny_config


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    AutoModelForCausalLM.from_config(tiny_config("llama")).save_pretrained(folder)
    return folder


def parts(model: Path, **more: Any) -> dict[str, Any]:
    return frozen_parts(TrainConfig(**{"model": model, "train_data": ("d",), "lora_dim": 4, **more}))


def test_the_same(model: Path) -> None:
    check_same_frozen_parts(parts(model), parts(model))
    check_same_frozen_parts(parts(model, load_in_4bit=True), parts(model, load_in_4bit=True))
    without = {name: value for name, value in parts(model).items() if name != "quantisation"}
    check_same_frozen_parts(parts(model), {})  # a run without adapters is refused by its options
    check_same_frozen_parts({}, parts(model))
    check_same_frozen_parts(without, parts(model))  # a checkpoint of a version that quantised nothing


@pytest.mark.parametrize(
    ("then", "now", "message"),
    [
        ({}, {"load_in_8bit": True}, "was not quantised in the checkpoint's run and is in 8 bits now"),
        ({"load_in_4bit": True}, {}, r"was in 4 bits \(nf4, scales quantised too\) in .* is not quantised now"),
        (
            {"load_in_4bit": True},
            {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
            r"was .* and is in 4 bits \(fp4",
        ),
        (
            {"load_in_4bit": True, "skip_quant": "q_proj"},
            {"load_in_4bit": True},
            r"was in 4 bits .*\), without q_proj in the checkpoint's run",
        ),
    ],
)
def test_held_in_another_way(model: Path, then: dict[str, Any], now: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"the model {message}"):
        check_same_frozen_parts(parts(model, **then), parts(model, **now))


def save_changed(model: Path, to: Path) -> None:
    """The model with one matrix that differs a little."""
    other = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.add_(0.01)
    other.save_pretrained(to)


def test_another_model(model: Path, tmp_path: Path) -> None:
    save_changed(model, tmp_path)
    with pytest.raises(UserError, match="--model has other weights"):
        check_same_frozen_parts(parts(model), parts(tmp_path))


def lora(model: Path, **more: Any) -> TrainConfig:
    return TrainConfig(model=model, train_data=("d",), **more)


def saved(config: TrainConfig) -> dict[str, Any]:
    """What a checkpoint keeps of it, as far as it is compared."""
    return {**resolved_options(config), **frozen_parts(config)}


@pytest.mark.parametrize(
    ("then", "now", "message"),
    [
        ({"lora_dim": 4}, {"lora_dim": 4, "lora_alpha": 8.0}, "lora_alpha 4, and it would be 8.0 now"),
        ({"lora_dim": 4, "lora_alpha": 8.0}, {"lora_dim": 4}, "lora_alpha 8.0, and it would be 4 now"),
        ({"lora_dim": 4}, {"lora_dim": 4, "use_rslora": True}, "use_rslora False, and it would be True now"),
        ({"lora_dim": 4}, {"lora": "adapter"}, "lora_alpha 4, and it would be 32 now"),
        (
            {"lora": "adapter"},
            {"lora_dim": 4, "lora_alpha": 32.0},
            r"alpha_pattern \{'q_proj': 2\}, and it would be \{\}",
        ),
    ],
)
def test_adapters_of_another_scale(
    model: Path, tmp_path: Path, then: dict[str, Any], now: dict[str, Any], message: str
) -> None:
    """Nothing in the tensors tells it: the folder made of a checkpoint would be another adapter."""
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 32, "alpha_pattern": {"q_proj": 2}}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(fields))
    first, second = (
        lora(model, **{name: tmp_path / value if name == "lora" else value for name, value in given.items()})
        for given in (then, now)
    )
    check_same_adapters(saved(first), first)
    check_same_adapters(saved(second), second)
    with pytest.raises(UserError, match=f"--from_ckpt: its adapters were trained with {message}.*or --force_resume"):
        check_same_adapters(saved(first), second)


def test_what_changes_nothing_of_adapters(model: Path) -> None:
    then = saved(lora(model, lora_dim=4))
    check_same_adapters(then, lora(model, lora_dim=4, lora_alpha=4.0, lora_dropout=0.5, load_in_4bit=True))
    check_same_adapters({}, lora(model, lora_dim=4, lora_alpha=9.0))  # a checkpoint of an older version
    control = lora(model, control_adapter_rank=2)
    check_same_adapters(saved(control), control)


def test_adapters_beside_another_model(model: Path, tmp_path: Path) -> None:
    save_changed(model, tmp_path)
    with pytest.raises(UserError, match="--model has other weights"):
        check_same_adapters(saved(lora(model, lora_dim=4)), lora(tmp_path, lora_dim=4))
