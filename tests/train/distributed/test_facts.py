"""What processes compare: what options mean, not how they are written; what may differ is left out."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from jllm.models.adapters.adapter_files import WEIGHTS_NAME
from jllm.parallel.meeting import Facts, differences
from jllm.train.config import TrainConfig
from jllm.train.distributed.facts import facts_of
from jllm.train.shape import resolve_shape
from tests.fixtures import tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("facts")
    tiny_llama(folder, tied=True)
    return folder


def facts(model: Path, **options: Any) -> Facts:
    config = TrainConfig(**{"model": model, "train_data": ("data",), **options})
    return facts_of(config, resolve_shape(config, 1))


@pytest.mark.parametrize(
    "same",
    [
        {"train_data": ("data=1",)},
        {"zero_stage": 1},
        {"gradient_accumulation_steps": 1},
        {"global_batch_size": 1},
        {"num_workers": 0},
        {"join_timeout": 3},
        {"processes": 4},
        {"learning_rate": 0.00001},
    ],
)
def test_the_same_in_other_words(model: Path, same: dict[str, Any]) -> None:
    assert differences(facts(model), facts(model, **same)) == []


def test_rates_of_modules_count_by_value(model: Path) -> None:
    one, same, other = (facts(model, module_learning_rate=(f"norm={rate}",)) for rate in ("1e-5", "0.00001", "2e-5"))
    assert differences(one, same) == []
    assert [name for name, _, _ in differences(one, other)] == ["--module_learning_rate"]


def test_every_other_option_counts(model: Path) -> None:
    """Whatever does not say that it may differ is compared: an option that is added cannot be forgotten."""
    found = facts(model)
    for field in dataclasses.fields(TrainConfig):
        assert (f"--{field.name}" in found) != field.metadata["option"].may_differ, field.name


def test_the_environment_counts(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = facts(model)
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    assert differences(before, facts(model)) == [("the environment variable NVIDIA_TF32_OVERRIDE", None, "0")]


def test_adapters_count_by_what_they_hold(model: Path, tmp_path: Path) -> None:
    for name, value in (("one", 1.0), ("copy", 1.0), ("other", 2.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
        save_file({"model.layers.0.lora_A.weight": torch.full((2, 4), value)}, tmp_path / name / WEIGHTS_NAME)
    one, copy, other = (facts(model, lora=tmp_path / name) for name in ("one", "copy", "other"))
    assert differences(one, copy) == []
    assert [name for name, _, _ in differences(one, other)] == ["adapter (hash) of model.layers.0"]
