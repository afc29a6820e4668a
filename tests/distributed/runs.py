"""Runs of the trainer inside a test's process group."""

import json
from pathlib import Path
from typing import Any


def train_rank(options: dict[str, Any]) -> str | None:
    """One rank of a run, in a process group that other runs use too; a user's mistake comes back as its message."""
    from jllm.errors import UserError
    from jllm.train.config import TrainConfig
    from jllm.train.loop import run

    try:
        run(TrainConfig(**options))
    except UserError as error:
        return str(error)
    return None


def records(folder: Path, key: str = "loss") -> list[dict[str, Any]]:
    """The training records of a run (or, with key "eval_loss", its evaluations)."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if key in record]
