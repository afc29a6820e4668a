"""A resumed run is the run that was never interrupted."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import Ranks
from tests.distributed.runs import records, train_rank
from tests.fixtures import random_rows, tiny_llama, write_rows

STEPS = 7


def options_of(folder: Path, name: str, **more: Any) -> dict[str, Any]:
    return {
        "model": folder / "model",
        "train_data": (str(folder / "data"),),
        "eval_data": (str(folder / "eval"),),
        "precision": "fp32",
        "pipe_parallel_size": 2,
        "per_device_train_batch_size": 2,
        "global_batch_size": 8,
        "max_steps": STEPS,
        "num_warmup_steps": 2,
        "learning_rate": 1e-2,
        "steps_per_checkpoint": 3,
        "steps_per_eval": 2,
        "checkpoint": folder / name,
        "log_dir": folder / f"{name}-log",
        "partition_method": "uniform",
        **more,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    tiny_llama(folder / "model", tied=True)
    write_rows(folder / "data", random_rows(21, labels=True, packed=True), files=3)
    write_rows(folder / "eval", random_rows(5, seed=1), files=1)
    return folder


def losses(folder: Path, name: str, key: str = "loss") -> list[tuple[int, float]]:
    return [(record["step"], record[key]) for record in records(folder / f"{name}-log", key)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resume_is_bit_identical(ranks: Callable[[int], Ranks], folder: Path, precision: str) -> None:
    straight, broken = f"straight-{precision}", f"broken-{precision}"
    group = ranks(4)
    assert group.run(train_rank, options_of(folder, straight, precision=precision)) == [None] * 4
    group.run(train_rank, options_of(folder, broken, precision=precision))
    for path in sorted((folder / broken).glob("step-*"))[1:]:
        shutil.rmtree(path)
    assert group.run(train_rank, options_of(folder, broken, precision=precision, resume_ckpt="auto")) == [None] * 4
    assert losses(folder, broken) == losses(folder, straight)
    assert losses(folder, broken, "eval_loss") == losses(folder, straight, "eval_loss")
    assert [step for step, _ in losses(folder, straight)] == list(range(1, STEPS + 1))


def test_another_number_of_stages_and_pipelines(ranks: Callable[[int], Ranks], folder: Path) -> None:
    """The checkpoint of 2 x 2 goes on as 1 x 2 and as 3 x 1: the same samples, the same losses to 1e-5."""
    ranks(4).run(train_rank, options_of(folder, "two-by-two"))
    expected = losses(folder, "two-by-two")
    start = str(folder / "two-by-two/step-00000003")
    for world_size, pipe in ((2, 1), (3, 3)):
        name = f"world-{world_size}"
        more = {"pipe_parallel_size": pipe, "resume_ckpt": start, "checkpoint": None}
        assert ranks(world_size).run(train_rank, options_of(folder, name, **more)) == [None] * world_size
        found = losses(folder, name)
        assert [step for step, _ in found] == [4, 5, 6, 7]
        for (step, loss), (reference_step, reference) in zip(found, expected[3:], strict=True):
            assert step == reference_step
            assert abs(loss - reference) < 1e-5


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"learning_rate": 5e-3}, "--learning_rate"),
        ({"global_batch_size": 16}, "--global_batch_size"),
        ({"optimizer": "sgd"}, "--optimizer"),
        ({"seed": 3}, "--seed"),
    ],
)
def test_changed_settings_are_refused(
    ranks: Callable[[int], Ranks], folder: Path, change: dict[str, Any], named: str
) -> None:
    if not (folder / "base/step-00000003").exists():
        ranks(2).run(train_rank, options_of(folder, "base"))
    answers = ranks(2).run(train_rank, options_of(folder, "base", resume_ckpt="auto", max_steps=9, **change))
    assert all(answer is not None and answer.startswith(named) for answer in answers)


def test_changed_data_is_refused(ranks: Callable[[int], Ranks], folder: Path) -> None:
    if not (folder / "base/step-00000003").exists():
        ranks(2).run(train_rank, options_of(folder, "base"))
    write_rows(folder / "other", random_rows(21, labels=True, packed=True, seed=9), files=3)
    more = {"resume_ckpt": "auto", "max_steps": 9, "train_data": (str(folder / "other"),)}
    answers = ranks(2).run(train_rank, options_of(folder, "base", **more))
    assert all(answer is not None and "--train_data has changed" in answer for answer in answers)
