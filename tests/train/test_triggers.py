"""When a run evaluates, saves and stops, which checkpoints it keeps, and what it calls a spike."""

import random
from pathlib import Path
from typing import Any

import pytest

from jllm.train.config import TrainConfig
from jllm.train.data.batching import EpochSteps
from jllm.train.optim.schedules import learning_rate
from jllm.train.triggers import Cadence, EarlyStop, SpikeWatch


def config_of(**more: Any) -> TrainConfig:
    return TrainConfig(model=Path("model"), train_data=("data",), **more)


def steps(kind: str, *, epochs: tuple[int, ...] = (8,), total: int = 20, **more: Any) -> list[int]:
    cadence = Cadence(config_of(**more), epochs=EpochSteps(counts=epochs), total_steps=total)
    return [step for step in range(1, total + 1) if getattr(cadence, kind)(step)]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, [8, 16, 20]),  # after each epoch, and after the last step
        ({"steps_per_eval": 6.0}, [6, 12, 18, 20]),
        ({"steps_per_eval": 0.25}, [2, 4, 6, 8, 10, 12, 14, 16, 18, 20]),  # four in an epoch
        ({"steps_per_eval": 0.5, "epochs": (5, 9)}, [3, 5, 10, 14, 19, 20]),  # epochs of unequal length
    ],
)
def test_evaluations(more: dict[str, Any], expected: list[int]) -> None:
    assert steps("evaluates", **more) == expected


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, [8, 16, 20]),
        ({"epochs": (5, 9)}, [5, 14, 20]),
        ({"steps_per_checkpoint": 6, "ckpt_step_gt": 6}, [12, 18, 20]),
        ({"steps_per_checkpoint": 3, "ckpt_epoch": "2"}, [9, 12, 15]),
        ({"steps_per_checkpoint": 3, "skip_epoch": "2"}, [3, 6, 18, 20]),
    ],
)
def test_checkpoints(more: dict[str, Any], expected: list[int]) -> None:
    assert steps("saves", **more) == expected


@pytest.mark.parametrize(
    ("more", "done", "expected"),
    [
        ({}, 0, []),
        ({"profile_step": 20}, 19, []),
        ({"profile_step": 21}, 0, ["--profile_step 21 is no step of this run, whose steps are 1 to 20: nothing"]),
        ({"trace_step": 3}, 3, ["--trace_step 3 is no step of this run, whose steps are 4 to 20: nothing"]),
        ({"trace_step": 3}, 20, ["--trace_step 3 is no step of this run, whose steps are all done: nothing"]),
        ({"trace_step": 3, "skip_train_steps": "2,3"}, 0, ["--trace_step 3 is one of --skip_train_steps: nothing"]),
        ({"trace_step": 21, "profile_step": 5}, 5, ["--trace_step 21 is no step", "--profile_step 5 is no step"]),
    ],
)
def test_steps_that_nobody_will_watch(more: dict[str, Any], done: int, expected: list[str]) -> None:
    config = config_of(log_dir=Path("log"), **more)
    found = Cadence(config, epochs=EpochSteps(counts=(8,)), total_steps=20).unwatched(done)
    assert len(found) == len(expected)
    assert all(line.startswith(start) for line, start in zip(found, expected, strict=True)), found


def test_early_stop_counts_rebounds_in_a_row() -> None:
    stop = EarlyStop(2)
    assert [stop.should_stop(loss) for loss in (3.0, 3.1, 3.0, 3.1, 3.2)] == [False, False, False, False, True]
    assert not any(EarlyStop(0).should_stop(loss) for loss in (1.0, 2.0, 3.0, 4.0))


def test_spikes_are_told_from_noise() -> None:
    rng = random.Random(0)
    watch = SpikeWatch()
    noisy = [3 - step / 500 + rng.gauss(0, 0.05) for step in range(300)]
    assert [watch.check(step, loss) for step, loss in enumerate(noisy)] == [None] * 300
    warning = watch.check(300, 4.0)
    assert warning is not None
    assert warning.startswith("step 300: loss 4.0000 is a spike; the median of the steps before is 2.4")
    # Neither a spike nor a loss that is no number moves what the next one is measured by.
    assert watch.check(301, float("nan")) is None
    assert watch.check(302, 4.0) is not None
    assert watch.check(303, 2.4) is None


def test_a_forced_learning_rate_wins_over_the_schedule() -> None:
    assert learning_rate(config_of(learning_rate=1e-3), 10, 20) != 2e-5
    forced = config_of(force_constant_lr=2e-5, num_warmup_steps=5.0)
    assert {learning_rate(forced, step, 20) for step in (1, 6, 20)} == {2e-5}
