"""A trace is read as it was written, and anything else is a mistake in one line."""

import json
from pathlib import Path

import pytest

from jllm.errors import UserError
from jllm.train.records.trace import read_trace
from tests.train.records.steps import step_of


def test_what_is_written_is_read(tmp_path: Path) -> None:
    found = step_of(stages=3, micro_batches=4, pipelines=2)
    path = found.write(tmp_path)
    assert path.name == "trace-step-5.json"
    assert read_trace(path) == found


@pytest.mark.parametrize(
    "damage",
    [
        lambda value: [],
        lambda value: {**value, "format": 2},
        lambda value: {**value, "processes": []},
        lambda value: {**value, "processes": [{"stage": 0}]},
        lambda value: {**value, "step": None},
        lambda value: json.loads(json.dumps(value).replace('"forward"', '"sideways"')),
        lambda value: json.loads(json.dumps(value).replace('"start": 0.0', '"start": 1e300')),
    ],
)
def test_other_files_are_refused(tmp_path: Path, damage: object) -> None:
    path = step_of(stages=2, micro_batches=2).write(tmp_path)
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))  # type: ignore[operator]
    with pytest.raises(UserError, match=r"no trace .* give a file that --trace_step wrote"):
        read_trace(path)
