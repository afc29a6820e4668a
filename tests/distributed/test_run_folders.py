"""A run's folders are its own: a second start, a new run and another run's checkpoints are refused; nothing is lost."""

import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jllm.train.lifecycle.run_lock import PREFIX, Holder
from tests.distributed.ranks import Ranks
from tests.distributed.runs import logged_options, records, train_rank
from tests.fixtures import random_rows, tiny_llama, write_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folders")
    tiny_llama(folder / "model", tied=True)
    write_rows(folder / "data", random_rows(16, labels=True), files=2)
    return folder


def options(folder: Path, place: Path, **more: Any) -> dict[str, Any]:
    return {
        **logged_options(folder, place, max_steps=3, checkpoint=place / "ckpt", steps_per_checkpoint=2),
        **more,
    }


def content(place: Path) -> dict[str, bytes]:
    return {str(path.relative_to(place)): path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file()}


def forge(folder: Path, *, age: float) -> Path:
    """The lock of a run on another host, touched `age` seconds ago."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{PREFIX}00000004"
    path.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(Holder.here("theirs"), host="elsewhere"))))
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_a_finished_run_leaves_no_lock_and_a_new_one_is_refused(
    ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path
) -> None:
    """The ways out are named, and each of them works."""
    assert ranks(2).run(train_rank, options(folder, tmp_path)) == [None] * 2
    assert not list(tmp_path.rglob(f"{PREFIX}*"))
    before = content(tmp_path)
    for more in ({}, {"checkpoint": None}, {"only_ckpt_model": True}, {"from_ckpt": tmp_path / "ckpt"}):
        answers = ranks(2).run(train_rank, options(folder, tmp_path, **more))
        go_on = "" if more == {"checkpoint": None} else "--resume_ckpt auto to go on with it, "
        ways_out = f"of another run: give {go_on}--clean to start over, or another folder"
        assert all(answer is not None and ways_out in answer for answer in answers)
    assert content(tmp_path) == before
    assert ranks(2).run(train_rank, options(folder, tmp_path, resume_ckpt="auto")) == [None] * 2
    assert ranks(2).run(train_rank, options(folder, tmp_path, clean=True, max_steps=1)) == [None] * 2
    assert [record["step"] for record in records(tmp_path / "log")] == [1]


def test_the_checkpoints_of_another_run_are_not_mixed_with(
    ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path
) -> None:
    for name in ("one", "other"):
        assert ranks(2).run(train_rank, options(folder, tmp_path / name)) == [None] * 2
    start = str(tmp_path / "one/ckpt/step-00000002")
    answers = ranks(2).run(train_rank, options(folder, tmp_path / "other", resume_ckpt=start))
    assert all(answer is not None and "holds step-00000003 of another run" in answer for answer in answers)
    assert ranks(2).run(train_rank, options(folder, tmp_path / "one", resume_ckpt=start)) == [None] * 2
    runs = {json.loads(path.read_text())["run"] for path in (tmp_path / "one").rglob("index.json")}
    assert len(runs) == 1


def test_a_folder_in_use_is_refused_and_waited_for_by_auto(
    ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path
) -> None:
    lock = forge(tmp_path / "ckpt", age=0)
    answers = ranks(2).run(train_rank, options(folder, tmp_path))
    assert all(answer is not None and "in use by another run" in answer and "elsewhere" in answer for answer in answers)
    answers = ranks(2).run(train_rank, options(folder, tmp_path, resume_ckpt="auto", lock_wait=1))
    assert all(answer is not None and "in use by another run" in answer for answer in answers)
    assert lock.exists()
    forge(tmp_path / "ckpt", age=118.5)  # its holder is gone: after 120 s without a touch nobody waits any more
    assert ranks(2).run(train_rank, options(folder, tmp_path, resume_ckpt="auto", lock_wait=60)) == [None] * 2
    assert not list(tmp_path.rglob(f"{PREFIX}*"))
