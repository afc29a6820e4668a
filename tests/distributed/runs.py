"""Runs of the trainer inside a test's process group."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SHORT: dict[str, Any] = {
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 2,
    "lr_scheduler_type": "constant",
}
"""Steps of four rows in two micro-batches, as plain references take them."""


def train_rank(options: dict[str, Any]) -> str | None:
    """One rank of a run, in a process group that other runs use too; a user's mistake comes back as its message."""
    from jllm.errors import UserError
    from jllm.parallel import peers
    from jllm.train.config import TrainConfig
    from jllm.train.trainer import run

    try:
        run(TrainConfig(**options))
    except UserError as error:
        peers.may_speak()  # as the command does: the others are told that this process ends in order
        return str(error)
    return None


def train_ranks(runs: list[dict[str, Any]]) -> list[str | None]:
    """The same of several runs, one after the other, in one process group."""
    return [train_rank(options) for options in runs]


def train_rank_into(options: dict[str, Any], console: Path) -> str | None:
    """The same, its console added to a file."""
    with console.open("a") as file, contextlib.redirect_stdout(file):
        return train_rank(options)


def fp16_works() -> bool:
    """Of this rank's device: the newest processors have it, most have not."""
    from deepspeed.accelerator import get_accelerator

    return bool(get_accelerator().is_fp16_supported())


def options_of(folder: Path, settings: Mapping[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """Options of a short run on two stages, of the model and the data in `folder`; `more` has the last word."""
    return {
        "model": folder / "model",
        "train_data": (str(folder / "data"),),
        "precision": "fp32",
        "pipe_parallel_size": 2,
        **(settings or {}),
        **more,
    }


def logged_options(folder: Path, name: Path, **more: Any) -> dict[str, Any]:
    """The same with 4 micro-batches a step, and records below `name`."""
    settings = {"gradient_accumulation_steps": 4, "learning_rate": 1e-3, "log_dir": name / "log"}
    return options_of(folder, settings, **more)


def records(folder: Path, key: str = "loss", *, ignore_broken: bool = False) -> list[dict[str, Any]]:
    """The training records of a run (or, with key "eval_loss", its evaluations).

    `ignore_broken`: the last line may be half written.
    """
    lines = (folder / "metrics.jsonl").read_text().split("\n")
    complete = lines[:-1] if ignore_broken else [line for line in lines if line]
    return [record for record in map(json.loads, complete) if key in record]
