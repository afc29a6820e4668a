"""A step's profile is a file and one line; a disk that does not take it is a warning."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.distributed.ranks import Ranks


def profiled(folder: Path, errors: Path) -> list[str]:
    """What a run says of the profile of its step 2, in a process of its own; its standard error goes to a file."""
    import torch

    from jllm.parallel.mesh import Mesh
    from jllm.train.distributed import profiling

    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    said: list[str] = []
    recorder: Any = SimpleNamespace(warn=said.append, event=lambda kind, line, **more: said.append(line))
    collectives: Any = SimpleNamespace(place=Mesh().place(0))
    config: Any = SimpleNamespace(resolved_log_dir=folder, profile_step=2)
    for step in (1, 2, 3):
        with profiling._profiled(collectives, config, step, recorder):
            torch.ones(3).add_(1)
    return said


def test_a_file_and_one_line(tmp_path: Path) -> None:
    [said] = Ranks(1).run(profiled, tmp_path / "log", tmp_path / "errors")
    [path] = (tmp_path / "log").iterdir()
    assert said == [f"wrote {path}"]
    assert "aten::add_" in path.read_text()
    # The profiler of PyTorch has lines of its own, which are nothing to a user.
    assert (tmp_path / "errors").read_text() == ""


def test_a_folder_that_cannot_be_made_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    [said] = Ranks(1).run(profiled, tmp_path / "file/log", tmp_path / "errors")
    assert said == ["the profile of step 2 could not be written: Not a directory"]
