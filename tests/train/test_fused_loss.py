"""Whether the loss is fused with the head: by the options, the device and the head, in one line for people."""

from pathlib import Path
from typing import Any

import pytest
from deepspeed.accelerator import get_accelerator

from jllm.errors import UserError
from jllm.train.config import TrainConfig
from jllm.train.fused_loss import fused_loss_note, wants_fused_loss


def config_of(**more: Any) -> TrainConfig:
    return TrainConfig(model=Path("m"), train_data=("d",), **more)


@pytest.mark.parametrize(
    ("more", "device", "is_wanted", "said"),
    [
        ({}, "cpu", False, "loss: not fused with the head: it gains nothing on this device"),
        ({}, "cuda", True, "loss: fused with the head"),
        ({"precision": "fp32"}, "cuda", True, "loss: fused with the head"),
        ({"precision": "fp16"}, "cuda", False, "loss: not fused with the head: --precision fp16"),
        ({"fused_loss": "on"}, "cpu", True, "loss: fused with the head"),
        ({"model_parallel_size": 2, "sequence_parallel_size": 2}, "cuda", True, "loss: fused with the head"),
        (
            {"model_parallel_size": 2, "loss": "dpo"},
            "cuda",
            False,
            "loss: not fused with the head: --model_parallel_size 2 with --loss dpo",
        ),
        ({"fused_loss": "off"}, "cuda", False, "loss: not fused with the head: --fused_loss off"),
    ],
)
def test_options_and_device(
    more: dict[str, Any], device: str, is_wanted: bool, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(get_accelerator(), "device_name", lambda index=None: device)
    config = config_of(**more)
    assert wants_fused_loss(config) == is_wanted
    assert fused_loss_note(config, is_plain=True) == said


def test_a_head_that_is_not_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(get_accelerator(), "device_name", lambda index=None: "cuda")
    reason = "the model's head is more than a product, a factor and a soft cap, or has adapters"
    assert fused_loss_note(config_of(), is_plain=False) == f"loss: not fused with the head: {reason}"
    with pytest.raises(UserError, match=f"--fused_loss on: {reason}; give auto or off"):
        fused_loss_note(config_of(fused_loss="on"), is_plain=False)


def test_fp16_is_refused() -> None:
    with pytest.raises(UserError, match="--fused_loss on with --precision fp16, in which its sums may overflow"):
        config_of(fused_loss="on", precision="fp16")
