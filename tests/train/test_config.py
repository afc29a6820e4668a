"""What the options refuse together, each by name."""

from pathlib import Path
from typing import Any

import pytest

from jllm.errors import UserError
from jllm.train.config import TrainConfig


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"log_dir": Path("x/../model")}, "--log_dir x/../model is the folder of --model"),
        ({"output_dir": Path("model")}, "--output_dir model is the folder of --model"),
        ({"checkpoint": Path("model")}, "--checkpoint model is the folder of --model"),
        ({"lora": Path("x/y"), "output_dir": Path("x/y")}, "--output_dir x/y is the folder of --lora"),
        ({"lora": Path("x/y"), "checkpoint": Path("x/z/../y")}, "--checkpoint x/z/../y is the folder of --lora"),
    ],
)
def test_a_run_does_not_write_over_what_it_reads(more: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainConfig(model=Path("model"), train_data=("data",), **more)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"lr_min": 1e-4}, "--lr_min 0.0001 is above --learning_rate 1e-05, from which the rate falls to it"),
        ({"num_warmup_steps": 1.5}, "--num_warmup_steps 1.5: give a share below 1, or a whole number from 1 on"),
        ({"steps_per_eval": 2.5}, "--steps_per_eval 2.5: give a share below 1"),
        ({"adam_eps": -1.0}, "--adam_eps -1.0: it must be at least 0"),
        ({"train_data": ("data=1e6",)}, "--train_data data=1e6: an epoch would have each row 1e+06 times"),
        ({"dropout": 1.0}, "--dropout 1.0: it must be below 1"),
    ],
)
def test_numbers(more: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refused:
        TrainConfig(**{"model": Path("model"), "train_data": ("data",), **more})
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({}, "there is one stage; give --pipe_parallel_size, or drop it"),
        ({"pipe_parallel_size": 2, "batch_size_tokens": 64}, "needs micro-batches of one shape"),
    ],
)
def test_what_nothing_overlaps_in(more: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        TrainConfig(model=Path("model"), train_data=("data",), schedule="overlapped", **more)


def test_what_half_layers_do_not_work_with() -> None:
    """One stage has no halves: published lines run as they are."""
    given: dict[str, Any] = {"split_dlayer": True, "control_adapter_rank": 2}
    message = "--split_dlayer with --control_adapter_rank: its adapters work on what a whole layer adds; drop one"
    with pytest.raises(UserError, match=message):
        TrainConfig(model=Path("model"), train_data=("data",), **given, pipe_parallel_size=2)
    TrainConfig(model=Path("model"), train_data=("data",), **given)
