"""`metrics.jsonl`: what a run that goes on keeps of it, and whose records they are."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from jllm.train.records.metrics_file import drop_from_step, line_of, run_of_records

LINES: list[dict[str, Any]] = [
    {"event": "start", "step": 0, "run": "one"},
    {"step": 0, "name": "web", "eval_loss": 3.0},
    {"step": 1, "loss": 2.0},
    {"step": 2, "loss": 2.0},
    {"step": 2, "name": "web", "eval_loss": 2.0},
    {"event": "checkpoint_written", "step": 2},
    {"step": 3, "loss": 2.0},
    {"event": "spike", "step": 3},
]


@pytest.mark.parametrize(
    ("first", "evaluates_first", "kept"),
    [
        (1, True, [0, 5, 7]),
        (3, False, [0, 1, 2, 3, 4, 5, 7]),
        (3, True, [0, 1, 2, 3, 5, 7]),
        (4, False, list(range(8))),
    ],
)
def test_what_is_repeated_is_dropped_and_events_stay(
    tmp_path: Path, first: int, evaluates_first: bool, kept: list[int]
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(map(line_of, LINES)) + '{"step": 3, "lo')
    drop_from_step(path, first, evaluates_first=evaluates_first)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [LINES[place] for place in kept]


def test_whose_records_they_are(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert run_of_records(path) is None
    for lines, run in ((LINES[1:], None), (LINES, "one"), ([*LINES[1:], {**LINES[0], "run": "two"}], "two")):
        path.write_text("".join(map(line_of, lines)))
        assert run_of_records(path) == run
    path.write_bytes(b"\xff\x00[1]\n5\n" + line_of(LINES[0]).encode())
    assert run_of_records(path) == "one"


def test_every_number_is_json() -> None:
    line = line_of({"step": 1, "loss": math.nan, "each": [1, -math.inf], "none": None})
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 1, "loss": "nan", "each": [1, "-inf"], "none": None}
