"""The lines of a run and its records: their form, the time left, and steps that are not finite."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jllm.train.records import metrics
from jllm.train.records.metrics import Recorder
from tests.train.records.lines import CLOCK, ESTIMATE_LINE, EVALUATION_LINE, STEP_LINE


def seconds_of(clock: str) -> int:
    return sum(int(part) * 60**power for power, part in enumerate(reversed(clock.split(":"))))


class Steps:
    """A recorder under a clock that only moves when told."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, folder: Path | None = None, *, total: int, first: int = 1
    ) -> None:
        self.now = 1000.0
        monkeypatch.setattr(metrics.time, "monotonic", lambda: self.now)
        self.recorder = Recorder(folder, enabled=True, total_steps=total, first_step=first, steps_per_print=1)

    def train(self, step: int, seconds: float, **more: Any) -> None:
        self.now += seconds
        record = {"step": step, "epoch": step / 7, "loss": 2.5, "lr": 1e-5, "grad_norm": 0.5, "mfu": None}
        record |= {"tokens_per_second": 12345.6, "data_wait": 0.01, "memory_mib": [100, 300], "seconds": seconds}
        self.recorder.train(record | more)


def test_every_line_has_the_form(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    steps = Steps(monkeypatch, total=100_000)
    cases: list[dict[str, Any]] = [
        {"mfu": 0.412},
        {"loss": None, "grad_norm": None},
        {"loss": math.nan, "grad_norm": math.inf, "lr": 0.0},
        {"lr": 1.25e-05, "tokens_per_second": 1.0},
        {"lr": 3.0, "loss": 12.25, "grad_norm": 1e6},
    ]
    for number, more in enumerate(cases, start=1):
        steps.train(number, 2000.0, **more)
    for name, step, loss in (("web", 0, 2.0), ("held-out", 5, 701.0)):
        perplexity = math.inf if loss > 700 else math.exp(loss)
        record = {"step": step, "name": name, "eval_loss": loss, "perplexity": perplexity, "accuracy": 0.5}
        steps.recorder.evaluation(record | {"eval_tokens": 12345, "seconds": 1.0})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(cases) + 3
    assert all(STEP_LINE.fullmatch(line) for line in lines[: len(cases)]), lines
    assert ESTIMATE_LINE.fullmatch(lines[len(cases)])
    assert all(EVALUATION_LINE.fullmatch(line) for line in lines[-2:]), lines
    for part in ("step 1/100000", "loss 2.5000", "12,346 tokens/s", "MFU 41.2%", "data wait 1.0%", "memory 0.3 GiB"):
        assert part in lines[0]
    assert "elapsed 33:20" in lines[0]


@pytest.mark.parametrize("first", [1, 41])
def test_time_left(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], first: int) -> None:
    """Steady steps: right to 20 % from the second step on, though an evaluation and a slow first step came before."""
    steps, total = Steps(monkeypatch, total=first + 499, first=first), 500
    steps.now += 3600  # an evaluation before the first step
    for done in range(1, total + 1):
        # 3 s, give or take a tenth; every 50th step is followed by 5 s of other things.
        steps.train(first + done - 1, 60.0 if done == 1 else 3.0 * (1 + 0.1 * (-1) ** done))
        steps.now += 5.0 if done % 50 == 0 else 0.0
    lines = capsys.readouterr().out.splitlines()
    estimate = lines.pop(metrics.ESTIMATE_STEPS)
    assert ESTIMATE_LINE.fullmatch(estimate)
    assert "the other 495 steps" in estimate
    for done, line in enumerate(lines[1:-1], start=2):
        expected = (total - done) * 3.1
        left = seconds_of(line.rpartition("left ")[2])
        assert abs(left - expected) <= 0.2 * expected + 1, line
    assert lines[-1].endswith("left 0:00")
    [said] = re.findall(rf"about ({CLOCK})", estimate)
    assert abs(seconds_of(said) - 495 * 3.1) < 0.2 * 495 * 3.1


DIES = """
import math, os, sys
from pathlib import Path
from jllm.train.records.metrics import Recorder
recorder = Recorder(Path(sys.argv[1]), enabled=True, total_steps=9, first_step=1, steps_per_print=1)
for step, loss, norm in ((1, 2.5, 0.5), (2, math.nan, math.inf)):
    recorder.train(dict(step=step, epoch=0.1, loss=loss, lr=1e-5, grad_norm=norm, mfu=None, tokens_per_second=1.0,
                        data_wait=0.0, memory_mib=[1], seconds=1.0))
os._exit(2)
"""


def test_what_is_not_finite_is_text_and_survives_the_end_of_the_run(tmp_path: Path) -> None:
    """As a rank ends that met an error: at once, with nothing closed."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = subprocess.run([sys.executable, "-c", DIES, str(tmp_path)], timeout=100, check=False)
    assert done.returncode == 2
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(each["loss"], each["grad_norm"]) for each in found] == [(2.5, 0.5), ("nan", "inf")]
    board = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, math.isnan(event.value)) for event in board.Scalars("train/loss")] == [(1, False), (2, True)]


def test_lines_of_pairs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = {"pairs": 4.0, "rewards/chosen": 0.5, "rewards/rejected": -0.25, "rewards/margins": 0.75,
             "rewards/accuracies": 0.75, "logps/chosen": -31.0, "logps/rejected": -40.5}  # fmt: skip
    steps = Steps(monkeypatch, total=10)
    steps.train(1, 2.0, **pairs)
    steps.recorder.evaluation({"step": 1, "name": "held", "eval_loss": 0.6, "eval_pairs": 12, "seconds": 3.0, **pairs})
    first, second = capsys.readouterr().out.splitlines()[-2:]
    for line in (first, second):
        assert "right 75.0%  margin 0.750  rewards 0.500 -0.250  logps -31.0 -40.5" in line
    assert "evaluation on held after step 1/10  loss 0.6000" in second
    assert second.endswith("12 pairs in 3.0 s")
