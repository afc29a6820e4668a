"""An option whose package is not there is refused by name, in a dry run too."""

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
    for package in ("peft", *OF_OPTIMIZERS.values()):
        monkeypatch.setitem(sys.modules, package, None)
    for optimizer in set(OPTIMIZERS) - set(OF_OPTIMIZERS):
        check_packages(TrainConfig(model=Path("model"), train_data=("data",), optimizer=optimizer))
