"""Every number of a record has a name, and what is no number has none."""

import math

from jllm.train.records.sinks.flat import flat_numbers


def test_names() -> None:
    step = {"time": "now", "step": 3, "loss": math.nan, "mfu": None, "memory_mib": [1, 2], "is_it": True, "tokens": 5}
    found = flat_numbers(step)
    assert math.isnan(found.pop("train/loss"))
    assert found == {"train/memory_mib/0": 1.0, "train/memory_mib/1": 2.0, "train/tokens": 5.0}
    evaluation = {"step": 0, "name": "web", "eval_loss": 2, "loss_p50": 1.5}
    assert flat_numbers(evaluation) == {"eval/web/loss": 2.0, "eval/web/loss_p50": 1.5}
    event = {"event": "end", "step": 4, "exit_code": 75, "reason": "SIGTERM"}
    assert flat_numbers(event) == {"event/end/exit_code": 75.0}
