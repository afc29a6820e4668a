"""TensorBoard reads what the board writes: every number once, steps that are repeated in their newest form."""

import math
from pathlib import Path

import pytest

from jllm.train.records.sinks.flat import flat_numbers
from jllm.train.records.sinks.tensorboard import Board


def test_tensorboard_reads_every_number(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    records = [
        {"step": 1, "loss": 2.5, "memory_mib": [1, 2]},
        {"step": 2, "loss": math.inf, "memory_mib": [3, 4]},
        {"step": 2, "name": "held out", "eval_loss": 2.0, "loss_p99": 7.0},
        {"event": "checkpoint_written", "step": 2, "seconds": 0.5, "checkpoint": "x"},
        {"step": 3, "loss": 1.0},
    ]
    first = Board(tmp_path, 1, pytest.fail)
    for record in records:
        first.numbers(record)
    first.close()
    again = Board(tmp_path, 3, pytest.fail)
    again.numbers({"step": 3, "loss": 0.5})
    again.close()
    found = EventAccumulator(str(tmp_path)).Reload()
    expected: dict[str, dict[int, float]] = {}
    for record in [*records[:-1], {"step": 3, "loss": 0.5}]:
        for tag, value in flat_numbers(record).items():
            expected.setdefault(tag.replace(" ", "_"), {})[record["step"]] = value  # type: ignore[index]
    assert set(found.Tags()["scalars"]) == set(expected)
    for tag, values in expected.items():
        assert [(each.step, each.value) for each in found.Scalars(tag)] == list(values.items())
