"""Checkpoints and evaluations of slices: bit by bit where the layout is the same, to 1e-5 on any other."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jllm.models.weights.source import weight_files
from tests.distributed.ranks import Ranks
from tests.distributed.runs import records, train_ranks
from tests.fixtures import VOCABULARY, random_rows, write_rows
from tests.models.family_check import make_folder
from tests.models.tiny import tiny_config

STEPS = 4
SLICES = {"model_parallel_size": 2, "pipe_parallel_size": 2}
CUT = {**SLICES, "split_dlayer": True, "partition_method": "3,5"}
"""The same of stages that are cut inside a layer."""
OF_EVALUATIONS = ("eval_loss", "eval_tokens", "accuracy", "top5_accuracy", "loss_p50", "loss_p99", "entropy_p50")


def options_of(folder: Path, name: str, **more: Any) -> dict[str, Any]:
    return {
        "model": folder / "model",
        "train_data": (str(folder / "data"),),
        "eval_data": (str(folder / "eval"),),
        "precision": "fp32",
        "adam_eps": 1e-4,
        "learning_rate": 5e-3,
        "per_device_train_batch_size": 2,
        "global_batch_size": 4,
        "max_steps": STEPS,
        "steps_per_checkpoint": 2,
        "steps_per_eval": 2,
        "checkpoint": folder / name,
        "log_dir": folder / f"{name}-log",
        "output_dir": folder / f"{name}-out",
        "partition_method": "uniform",
        **more,
    }


def run_all(ranks: Callable[[int], Ranks], count: int, runs: list[dict[str, Any]]) -> None:
    assert ranks(count).run(train_ranks, runs) == [[None] * len(runs)] * count


def losses(folder: Path, name: str) -> list[float]:
    return [record["loss"] for record in records(folder / f"{name}-log")]


def weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: tensor for path in weight_files(folder) for name, tensor in load_file(path).items()}


def distance(one: Path, other: Path) -> float:
    """The largest difference of a weight between two folders."""
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    return max(float((mine[name] - theirs[name]).abs().max()) for name in mine)


def test_noise_goes_on_alike_on_all_slices(ranks: Callable[[int], Ranks], tmp_path: Path) -> None:
    """The second of two stages drew no noise; where it is a slice now, it has that of the first one."""
    make_folder(tiny_config("llama", vocab_size=VOCABULARY), tmp_path / "model")
    write_rows(tmp_path / "data", random_rows(10, labels=True, packed=True), files=2)
    noisy: dict[str, Any] = {"neftune_alpha": 5.0, "eval_data": ()}
    other = {"model_parallel_size": 2, "resume_ckpt": str(tmp_path / "stages" / "step-00000002")}
    runs = [
        options_of(tmp_path, "stages", pipe_parallel_size=2, **noisy),
        options_of(tmp_path, "slices", **other, **noisy),
    ]
    run_all(ranks, 2, runs)
    assert losses(tmp_path, "slices") == pytest.approx(losses(tmp_path, "stages")[2:], abs=1e-5)
    assert distance(tmp_path / "slices-out", tmp_path / "stages-out") <= 1e-5


@pytest.mark.parametrize("family", ["mixtral", "gemma2"])
def test_other_layouts_go_on(ranks: Callable[[int], Ranks], tmp_path: Path, family: str) -> None:
    """Experts are cut along their second axis; a tied embedding is on both ends. Four ranks share two heads. Stages
    are cut inside a layer, or are not."""
    from jllm.train.checkpoint.to_folder import to_folder

    make_folder(tiny_config(family, tied=family == "gemma2", vocab_size=VOCABULARY), tmp_path / "model")
    write_rows(tmp_path / "data", random_rows(10, labels=True, packed=True), files=2)
    write_rows(tmp_path / "eval", random_rows(5, seed=1), files=1)
    half = "step-00000002"
    run_all(
        ranks,
        4,
        [
            options_of(tmp_path, "slices", **CUT),
            options_of(tmp_path, "zero", model_parallel_size=2, zero_stage=1),
            options_of(tmp_path, "four", model_parallel_size=4, resume_ckpt=str(tmp_path / "slices" / half)),
        ],
    )
    run_all(
        ranks,
        1,
        [
            options_of(tmp_path, "one"),
            options_of(tmp_path, "joined", resume_ckpt=str(tmp_path / "slices" / half)),
            options_of(tmp_path, "from-zero", resume_ckpt=str(tmp_path / "zero" / half)),
        ],
    )
    expected = losses(tmp_path, "one")
    for name in ("slices", "zero", "four", "joined", "from-zero"):
        found = losses(tmp_path, name)
        assert len(found) == (STEPS if name in ("slices", "zero") else STEPS - 2)
        assert found == pytest.approx(expected[-len(found) :], abs=1e-5), name
        assert distance(tmp_path / f"{name}-out", tmp_path / "one-out") <= 1e-5, name
    for mine, theirs in zip(
        records(tmp_path / "slices-log", "eval_loss"), records(tmp_path / "one-log", "eval_loss"), strict=True
    ):
        assert [mine[key] for key in OF_EVALUATIONS] == pytest.approx([theirs[key] for key in OF_EVALUATIONS], abs=1e-5)
        assert (mine["accuracy"], mine["top5_accuracy"]) == (theirs["accuracy"], theirs["top5_accuracy"])
    to_folder(tmp_path / "slices", tmp_path / "cat", model=tmp_path / "model")
    assert distance(tmp_path / "cat", tmp_path / "slices-out") == 0

    straight = losses(tmp_path, "slices")
    shutil.rmtree(tmp_path / "slices" / f"step-{STEPS:08d}")
    shutil.move(tmp_path / "slices-out", tmp_path / "straight-out")
    run_all(
        ranks,
        4,
        [
            options_of(tmp_path, "slices", **CUT, resume_ckpt="auto"),
            options_of(tmp_path, "whole", **SLICES, resume_ckpt=str(tmp_path / "slices" / half)),
            options_of(tmp_path, "cut", **CUT, resume_ckpt=str(tmp_path / "one" / half)),
            {
                **options_of(tmp_path, "converted", model_parallel_size=2, from_ckpt=tmp_path / "slices"),
                "num_train_epochs": 0,
                "max_steps": None,
                "checkpoint": None,
            },
        ],
    )
    assert distance(tmp_path / "converted-out", tmp_path / "straight-out") == 0
    assert losses(tmp_path, "slices") == straight
    assert distance(tmp_path / "slices-out", tmp_path / "straight-out") == 0
    for name in ("whole", "cut"):
        assert losses(tmp_path, name) == pytest.approx(expected[2:], abs=1e-5), name
        assert distance(tmp_path / f"{name}-out", tmp_path / "one-out") <= 1e-5, name
