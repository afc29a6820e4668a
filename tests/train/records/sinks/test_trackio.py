"""trackio's own package, on a folder: numbers, the run that goes on, artefacts."""

import json
import sqlite3
from pathlib import Path

import pytest

from tests.train.records.sinks.reporting import NAMES, report


@pytest.mark.parametrize("files", [False, True])
def test_trackio(tmp_path: Path, files: bool) -> None:
    report(tmp_path, "trackio", files=files)
    [database] = [path for path in (tmp_path / "trackio").rglob("*.db") if path.stem == "jllm"]
    with sqlite3.connect(database) as connection:
        found = connection.execute("select run_name, run_id, step, metrics from metrics order by id").fetchall()
        artifacts = connection.execute("select * from run_artifact_links").fetchall()
    assert {name for name, *_ in found} == {"0123456789abcdef"}
    assert len({run for _, run, *_ in found}) == 1
    records = [(step, json.loads(metrics)) for *_, step, metrics in found]
    losses = [(step, record["train/loss"]) for step, record in records if "train/loss" in record]
    assert losses == [(step, pytest.approx(1 / step)) for step in (1, 2, 3, 3, 4, 5)]
    assert set(NAMES) <= {name for _, record in records for name in record}
    assert artifacts
