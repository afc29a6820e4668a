"""A run and a dry run know at their start what will be written: a disk with less room is refused, and no other."""

from pathlib import Path
from typing import Any

import pytest

from jllm.errors import UserError
from tests.distributed.ranks import Ranks
from tests.distributed.runs import SHORT, options_of
from tests.fixtures import random_rows, tiny_llama, write_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("room")
    tiny_llama(folder / "model", tied=True)
    write_rows(folder / "data", random_rows(24, labels=True), files=1)
    return folder


def counted(options: dict[str, Any]) -> list[dict[str, int]]:
    """What the dry run of a rank, and then its run, take the checkpoint and the folder at the end to need."""
    from jllm.train import trainer
    from jllm.train.checks import room
    from jllm.train.config import TrainConfig

    found: list[dict[str, int]] = []
    room.require_disk = lambda folder, needed, purpose, *, option: found[-1].update({option.strip(): needed})
    for more in ({"dry_run": True}, {}):
        found.append({})
        trainer.run(TrainConfig(**options, **more))
    return found


STATES = 5200
"""Bytes of a process's random-number states in a checkpoint, which are not counted."""


def bytes_of_tensors(folder: Path) -> int:
    """In all safetensors files of a folder."""
    files = list(folder.glob("*.safetensors"))
    return sum(path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little") for path in files)


@pytest.mark.parametrize(
    ("size", "more"),
    [
        (1, {"pipe_parallel_size": 1}),
        (2, {"optimizer": "sgd"}),
        (2, {"precision": "bf16"}),
        (2, {"pipe_parallel_size": 1, "zero_stage": 1}),
        (2, {"pipe_parallel_size": 1, "precision": "bf16"}),
        (2, {"pipe_parallel_size": 1, "model_parallel_size": 2}),
        (2, {"pipe_parallel_size": 1, "sequence_parallel_size": 2}),
        (2, {"lora_dim": 4}),
        (2, {"pipe_parallel_size": 1, "only_ckpt_model": True}),
    ],
    ids=lambda value: "-".join(f"{name}={each}" for name, each in value.items()) if isinstance(value, dict) else None,
)
def test_it_is_what_is_written(folder: Path, tmp_path: Path, size: int, more: dict[str, Any]) -> None:
    places = {"checkpoint": tmp_path / "ckpt", "output_dir": tmp_path / "out", "max_steps": 2}
    told = Ranks(size).run(counted, options_of(folder, SHORT, **places, steps_per_checkpoint=2, **more))
    [step] = (tmp_path / "ckpt").glob("step-*")
    states = 0 if "only_ckpt_model" in more else STATES * size
    written = {"--checkpoint": bytes_of_tensors(step) - states, "--output_dir": bytes_of_tensors(tmp_path / "out")}
    dry, run = told[0]
    assert all(answer[1] == run for answer in told), "every process knows the same"
    assert dry.keys() == run.keys() == written.keys()
    for name, needed in written.items():
        assert dry[name] == pytest.approx(needed, rel=0.02)
        assert run[name] == pytest.approx(needed, rel=0.02)


def refused(options: dict[str, Any]) -> list[str]:
    """What the dry run of a rank, and its run, say of a disk with a thousand bytes."""
    import shutil
    import types

    from jllm.train import trainer
    from jllm.train.config import TrainConfig

    shutil.disk_usage = lambda path: types.SimpleNamespace(free=1000)  # type: ignore[assignment,return-value]
    said = []
    for more in ({"dry_run": True}, {}):
        with pytest.raises(UserError) as caught:
            trainer.run(TrainConfig(**options, **more))
        said.append(str(caught.value))
    return said


@pytest.mark.parametrize("option", ["checkpoint", "output_dir"])
def test_a_run_and_its_dry_run_refuse_alike(folder: Path, tmp_path: Path, option: str) -> None:
    options = options_of(folder, SHORT, pipe_parallel_size=1, max_steps=2, **{option: tmp_path / "there"})
    [said] = Ranks(1).run(refused, options)
    assert said[0] == said[1]
    assert said[0].startswith(f"--{option} {tmp_path / 'there'}: ")
    assert said[0].endswith(" and 0 MiB are free; free some, or write elsewhere")
