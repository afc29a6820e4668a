"""A real run that reports: one run of the service over two starts, with its checkpoints and its model."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import Ranks
from tests.distributed.runs import logged_options, records, train_rank
from tests.fixtures import random_rows, tiny_llama, write_rows


def train_rank_with(options: dict[str, Any], environment: dict[str, str]) -> str | None:
    os.environ.update(environment)
    return train_rank(options)


def test_mlflow(ranks: Callable[[int], Ranks], tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason='mlflow is not installed: pip install "jllm[report]"')
    tiny_llama(tmp_path / "model", tied=True)
    write_rows(tmp_path / "data", random_rows(24), files=2)
    environment = {"MLFLOW_TRACKING_URI": str(tmp_path / "mlruns"), "MLFLOW_ALLOW_FILE_STORE": "true"}
    more = {"checkpoint": tmp_path / "ckpt", "steps_per_checkpoint": 2, "resume_ckpt": "auto", "report_to": "mlflow"}
    for steps in (3, 5):
        given = {**more, "max_steps": steps, "output_dir": tmp_path / "out"}
        given["lr_scheduler_type"] = "constant"  # a longer run then has the same learning rates
        assert ranks(2).run(train_rank_with, logged_options(tmp_path, tmp_path, **given), environment) == [None] * 2
    [run] = [path.parent for path in (tmp_path / "mlruns").rglob("tags") if (path / "jllm.run").exists()]
    [name] = {event["run"] for event in records(tmp_path / "log", "event") if event["event"] == "start"}
    assert (run / "tags/jllm.run").read_text() == name
    losses = [line.split() for line in (run / "metrics/train/loss").read_text().splitlines()]
    assert [(int(step), pytest.approx(float(value))) for _, value, step in losses] == [
        (record["step"], record["loss"]) for record in records(tmp_path / "log")
    ]
    found = sorted(path.relative_to(run / "artifacts") for path in (run / "artifacts").rglob("*.json"))
    assert [str(path) for path in found] == [
        "checkpoint/step-00000002.json",
        "checkpoint/step-00000003.json",
        "checkpoint/step-00000004.json",
        "checkpoint/step-00000005.json",
        "model/step-00000003.json",
        "model/step-00000005.json",
    ]
    told = json.loads((run / "artifacts/checkpoint/step-00000004.json").read_text())
    assert told == {"step": 4, "folder": str(tmp_path / "ckpt/step-00000004")}
    assert not [event for event in records(tmp_path / "log", "event") if event["event"] == "warning"]
