"""An option whose package is not there is refused by name, in a dry run too."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from jllm.errors import UserError
from jllm.train.checks.packages import OF_OPTIMIZERS, check_packages
from jllm.train.config import TrainConfig
from jllm.train.options.optimizer import OPTIMIZERS

CASES: list[tuple[dict[str, Any], str, str]] = [
    ({"lora_dim": 4}, "peft", "adapters"),
    ({"lora": Path("adapter")}, "peft", "adapters"),
    ({"lora_dim": 4, "load_in_4bit": True}, "bitsandbytes", "adapters"),
    ({"lora_dim": 4, "load_in_8bit": True}, "bitsandbytes", "adapters"),
    ({"fp8": "rowwise"}, "torchao", "fp8"),
    *(
        ({"optimizer": name, "lr_scheduler_type": "constant"}, package, "optimizers")
        for name, package in OF_OPTIMIZERS.items()
    ),
]


@pytest.mark.parametrize(("more", "package", "extra"), CASES)
def test_what_is_missing(monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], package: str, extra: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    config = TrainConfig(model=Path("model"), train_data=("data",), **more)
    with pytest.raises(UserError, match=rf"needs {package} .*pip install 'jllm\[{extra}\]'"):
        check_packages(config)


def test_others_need_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("peft", "torchao", *OF_OPTIMIZERS.values()):
        monkeypatch.setitem(sys.modules, package, None)
    for optimizer in set(OPTIMIZERS) - set(OF_OPTIMIZERS):
        check_packages(TrainConfig(model=Path("model"), train_data=("data",), optimizer=optimizer))


def test_a_quantised_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"load_in_4bit": True}}))
    with pytest.raises(UserError, match=r"^--model .* is quantised, needs bitsandbytes"):
        check_packages(TrainConfig(model=tmp_path, train_data=("data",), lora_dim=4))
