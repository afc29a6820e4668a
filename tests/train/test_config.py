"""What the options refuse together, each by name."""

from pathlib import Path
from typing import Any

import pytest

from jllm.errors import UserError
from jllm.train.config import TrainConfig


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"log_dir": Path("x/../model")}, "--log_dir x/../model is the folder of --model"),
        ({"output_dir": Path("model")}, "--output_dir model is the folder of --model"),
        ({"checkpoint": Path("model")}, "--checkpoint model is the folder of --model"),
    ],
)
def test_a_run_does_not_write_over_its_model(more: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainConfig(model=Path("model"), train_data=("data",), **more)
