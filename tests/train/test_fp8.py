"""What `--fp8` needs, what it is refused with, and what the start says of it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from jllm.errors import UserError
from jllm.models.pipeline.stage import PipelineStage
from jllm.parallel.mesh import Mesh
from jllm.train import fp8
from jllm.train.config import TrainConfig
from jllm.train.dry_run import Alone
from tests.models.chain import load_chain
from tests.models.family_check import make_folder
from tests.models.tiny import tiny_config


def config_of(**more: Any) -> TrainConfig:
    return TrainConfig(model=Path("m"), train_data=("d",), **more)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"precision": "fp32"}, "--fp8 rowwise with --precision fp32: give --precision bf16, or drop it"),
        ({"precision": "fp16"}, "--fp8 rowwise with --precision fp16: give --precision bf16, or drop it"),
        ({"lora_dim": 4}, "--fp8 rowwise is for a model that trains itself"),
        ({"lora_dim": 4, "load_in_4bit": True}, "--fp8 rowwise is for a model that trains itself"),
        ({"control_adapter_rank": 4}, "--fp8 rowwise is for a model that trains itself"),
    ],
)
def test_other_options(more: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_of(fp8="rowwise", **more)
    config_of(**more)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    fp8.check_device(config_of())
    asked = config_of(fp8="tensorwise")
    monkeypatch.setattr(get_accelerator(), "device_name", lambda index=None: "cpu")
    with pytest.raises(UserError, match=r"^--fp8 tensorwise needs a CUDA device .* 8.9 or more .* run is cpu; drop it"):
        fp8.check_device(asked)
    monkeypatch.setattr(get_accelerator(), "device_name", lambda index=None: "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(UserError, match=r"8.9 or more .*, and NVIDIA A100 has 8.0; drop it"):
        fp8.check_device(asked)
    for enough in ((8, 9), (9, 0), (10, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda enough=enough: enough)
        fp8.check_device(asked)


def notes_of(stage: PipelineStage, recipe: str = "tensorwise", *, is_compiled: bool = True) -> list[str]:
    agreement = Alone(Mesh())
    return fp8.fp8_notes(config_of(fp8=recipe), agreement, stage.model, stage.span, is_compiled=is_compiled)


def test_what_the_start_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed: pip install .[fp8]")
    monkeypatch.setattr(fp8, "EMULATED_ON", (get_accelerator().device_name(),))
    make_folder(tiny_config("llama", num_key_value_heads=1), tmp_path)
    [stage] = load_chain(tmp_path, [0, 4], dtype=torch.bfloat16)
    assert notes_of(stage, "off") == []
    fp8.use_fp8(stage.model, stage.span, "off")
    with pytest.raises(
        UserError, match=r"--fp8 tensorwise: .* 'llama' have no linear map whose sizes are multiples of"
    ):
        notes_of(stage)
    fp8.use_fp8(stage.model, stage.span, "tensorwise")
    said = (
        "fp8: 20 of 28 linear maps of decoder layers (tensorwise); others route, or their sizes are no multiples of 16"
    )
    assert notes_of(stage) == [said]
    assert notes_of(stage, is_compiled=False)[1].startswith("fp8 pays where decoder layers are compiled, and they are")


def test_maps_of_all_stages_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed: pip install .[fp8]")
    monkeypatch.setattr(fp8, "EMULATED_ON", (get_accelerator().device_name(),))
    make_folder(tiny_config("llama"), tmp_path)
    stages = load_chain(tmp_path, [0, 1, 4], dtype=torch.bfloat16)
    for stage in stages:
        fp8.use_fp8(stage.model, stage.span, "rowwise")
    counts = [(stage.span.index, fp8.fp8.count_maps(stage.model, stage.span)) for stage in stages]

    class Both(Alone):
        """Two pipelines of two stages."""

        def gather(self, value: Any) -> list[Any]:
            assert value in counts
            return counts * 2

    for stage in stages:
        [said] = fp8.fp8_notes(config_of(fp8="rowwise"), Both(Mesh()), stage.model, stage.span, is_compiled=True)
        assert said == "fp8: 28 of 28 linear maps of decoder layers (rowwise)"


@pytest.mark.parametrize("module", ["jllm.train.setup", "jllm.models.weights.source"])
def test_an_installed_torchao_says_nothing(module: str) -> None:
    """transformers imports it, whatever a run asks for."""
    pytest.importorskip("torchao", reason="torchao is not installed: pip install .[fp8]")
    code = f"import {module}, transformers.modeling_utils, sys; assert 'torchao' in sys.modules"
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == done.stderr == ""
