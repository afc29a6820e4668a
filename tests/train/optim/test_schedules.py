"""Learning rates against formulas written out here: warm-up, every schedule's begin, middle and end, and the floor."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jllm.errors import UserError
from jllm.train.config import TrainConfig
from jllm.train.optim.schedules import learning_rate, warmup_steps
from jllm.train.options.optimizer import SCHEDULES

PEAK, FLOOR, WARMUP, TOTAL = 1e-3, 1e-4, 10, 110
DECAY: dict[str, Callable[[float], float]] = {
    "linear": lambda p: FLOOR + (PEAK - FLOOR) * (1 - p),
    "polynomial": lambda p: FLOOR + (PEAK - FLOOR) * (1 - p) * (1 - p),
    "cosine": lambda p: FLOOR + (PEAK - FLOOR) * (0.5 + 0.5 * math.cos(math.pi * p)),
    "cosine_with_restarts": lambda p: FLOOR + (PEAK - FLOOR) * (0.5 + 0.5 * math.cos(math.pi * math.fmod(4 * p, 1))),
    "constant_with_warmup": lambda p: PEAK,
}
"""By the share of the steps after warm-up that are done; restarts with four cycles."""


def config_of(**more: Any) -> TrainConfig:
    given = {"learning_rate": PEAK, "lr_min": FLOOR, "num_warmup_steps": float(WARMUP), **more}
    if given.get("lr_scheduler_type") == "cosine_with_restarts":
        given["lr_cycles"] = 4
    return TrainConfig(model=Path("model"), train_data=("data",), **given)


def test_every_schedule_is_tested() -> None:
    assert {*DECAY, "constant", "rms_ratio"} == set(SCHEDULES)


@pytest.mark.parametrize("kind", DECAY)
def test_schedules(kind: str) -> None:
    rates = [learning_rate(config_of(lr_scheduler_type=kind), step, TOTAL) for step in range(1, TOTAL + 1)]
    assert rates[:WARMUP] == pytest.approx([PEAK * step / WARMUP for step in range(1, WARMUP + 1)])
    assert rates[WARMUP - 1] == PEAK
    # The first step after warm-up, one in each quarter of what remains, and the last one.
    for step in (11, 36, 61, 86, 110):
        assert rates[step - 1] == pytest.approx(DECAY[kind]((step - 11) / 100)), step
    assert min(rates[WARMUP:]) >= FLOOR
    if kind in ("linear", "polynomial", "cosine"):
        assert rates[WARMUP:] == sorted(rates[WARMUP:], reverse=True)
        assert rates[-1] - FLOOR <= 0.01 * (PEAK - FLOOR) * (1 + 1e-9)


def test_restarts_come_back_to_the_full_rate() -> None:
    config = config_of(lr_scheduler_type="cosine_with_restarts")
    full = [step for step in range(11, TOTAL + 1) if learning_rate(config, step, TOTAL) == pytest.approx(PEAK)]
    assert full == [11, 36, 61, 86]


def test_rms_ratio() -> None:
    """Word for word; the floor holds."""
    config = config_of(lr_scheduler_type="rms_ratio", num_warmup_steps=0.0, adam_beta2=0.99)
    for step in range(1, 51):
        expected = PEAK * math.sqrt((1 - 0.99**step) / (1 + 0.99**step))
        assert learning_rate(config, step, TOTAL) == pytest.approx(max(FLOOR, expected))


def test_constant_has_no_warmup() -> None:
    assert {learning_rate(config_of(lr_scheduler_type="constant"), step, TOTAL) for step in (1, 5, 50, TOTAL)} == {PEAK}


@pytest.mark.parametrize(("given", "steps"), [(0.0, 0), (7.0, 7), (0.1, 11), (0.001, 1), (110.0, 110)])
def test_warmup_in_steps_or_as_a_share(given: float, steps: int) -> None:
    config = config_of(num_warmup_steps=given)
    assert warmup_steps(config, TOTAL) == steps
    if steps:
        assert learning_rate(config, steps, TOTAL) == PEAK
        assert steps == 1 or learning_rate(config, steps - 1, TOTAL) < PEAK


def test_more_warmup_than_steps_is_refused() -> None:
    with pytest.raises(UserError, match="--num_warmup_steps 111 is more than the 110 steps"):
        warmup_steps(config_of(num_warmup_steps=111.0), TOTAL)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"optimizer": "sgd", "adam_beta1": 0.5}, "--adam_beta1 0.5: --optimizer sgd has none"),
        ({"optimizer": "sgd", "adam_eps": 1e-4}, "--adam_eps 0.0001: --optimizer sgd has none"),
        ({"optimizer": "sgd", "adam_beta2": 0.5}, "--adam_beta2 0.5: --optimizer sgd has none"),
        ({"lr_cycles": 3}, "--lr_cycles 3: --lr_scheduler_type cosine has none"),
    ],
)
def test_what_has_no_meaning_is_refused(more: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refused:
        config_of(**more)
    assert str(refused.value).startswith(message)
    config_of(optimizer="sgd", lr_scheduler_type="rms_ratio", adam_beta2=0.5, num_warmup_steps=0.0)
