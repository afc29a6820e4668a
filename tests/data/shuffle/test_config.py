"""Options of the shuffle: what is allowed, and what is said of the rest."""

from pathlib import Path
from typing import Any

import pytest

from jllm.data.shuffle.config import ShuffleConfig
from jllm.errors import UserError


@pytest.mark.parametrize("good", [{}, {"num_block": 1}, {"mem_rate": 1.0}, {"seed": 0}])
def test_allowed(good: dict[str, Any]) -> None:
    assert ShuffleConfig(data=Path("d"), **good).data == Path("d")


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"num_block": 0}, "--num_block 0: give at least 1"),
        ({"mem_rate": 0.0}, "--mem_rate 0.0: give a share above 0 and at most 1"),
        ({"mem_rate": 1.5}, "--mem_rate 1.5: give a share above 0 and at most 1"),
        ({"seed": -1}, "--seed -1: give 0 or more"),
    ],
)
def test_refused(bad: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        ShuffleConfig(data=Path("d"), **bad)
    assert str(caught.value) == said
