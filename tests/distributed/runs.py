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


def records(folder: Path, key: str = "loss", *, ignore_broken: bool = False) -> list[dict[str, Any]]:
    """The training records of a run (or, with key "eval_loss", its evaluations).

    `ignore_broken`: the last line may be half written.
    """
    lines = (folder / "metrics.jsonl").read_text().split("\n")
    complete = lines[:-1] if ignore_broken else [line for line in lines if line]
    return [record for record in map(json.loads, complete) if key in record]
