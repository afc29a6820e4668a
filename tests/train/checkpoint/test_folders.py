"""Checkpoint folders: found by step number, complete or not there at all."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jllm.errors import UserError
from jllm.train.checkpoint.folders import (
    INDEX_NAME,
    find_checkpoint,
    folder_of_step,
    list_checkpoints,
    publish,
    remove_checkpoint,
    remove_incomplete,
    step_of_folder,
    temporary_folder,
)


def complete(root: Path, *steps: int, marker: str = INDEX_NAME) -> None:
    for step in steps:
        folder_of_step(root, step).mkdir(parents=True)
        (folder_of_step(root, step) / marker).write_text("{}")


@pytest.mark.parametrize("step", [0, 7, 99_999_999, 123_456_789])
def test_names_and_back(tmp_path: Path, step: int) -> None:
    assert step_of_folder(folder_of_step(tmp_path, step)) == step


def test_checkpoints_are_in_the_order_of_steps_not_of_names(tmp_path: Path) -> None:
    complete(tmp_path, 99_999_999, 100_000_000, 5)
    (tmp_path / "step-00000009").mkdir()  # without its index it does not exist
    (tmp_path / "step-6").mkdir()
    assert [step_of_folder(path) for path in list_checkpoints(tmp_path)] == [5, 99_999_999, 100_000_000]
    assert list_checkpoints(tmp_path / "nowhere") == []
    complete(tmp_path, 3, marker="config.json")
    assert [step_of_folder(path) for path in list_checkpoints(tmp_path, marker="config.json")] == [3]


def test_a_published_folder_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    complete(tmp_path, 4)
    (folder_of_step(tmp_path, 4) / "old").touch()
    temporary = temporary_folder(folder_of_step(tmp_path, 4))
    temporary.mkdir()
    (temporary / INDEX_NAME).write_text("new")
    publish(folder_of_step(tmp_path, 4))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004"]
    assert [path.read_text() for path in folder_of_step(tmp_path, 4).iterdir()] == ["new"]


def test_what_a_dead_run_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    complete(tmp_path, 1, 2)
    temporary_folder(folder_of_step(tmp_path, 3)).mkdir()
    (tmp_path / "notes.tmp").touch()
    remove_incomplete(tmp_path)
    remove_checkpoint(folder_of_step(tmp_path, 1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.tmp", "step-00000002"]


@settings(deadline=None)
@given(step=st.integers(0, 10**12), zeros=st.integers(0, 12), prefix=st.sampled_from(["", "step-", "global_step"]))
def test_a_tag_names_a_step_however_it_is_written(
    tmp_path_factory: pytest.TempPathFactory, step: int, zeros: int, prefix: str
) -> None:
    root = tmp_path_factory.mktemp("ckpt")
    complete(root, step, step + 1)
    folder_of_step(root, step + 2).mkdir()  # incomplete
    assert find_checkpoint(root, f"{prefix}{'0' * zeros}{step}", option="--from_ckpt") == folder_of_step(root, step)
    for other in (
        f"{prefix}{step + 2}",
        f"{prefix}{step + 1}0001",
        f"-{step}",
        f"{step}.0",
        f"{prefix}{step}x",
        f"step{step}",
    ):
        with pytest.raises(UserError, match=r"--tag .*: no complete checkpoint of that name"):
            find_checkpoint(root, other, option="--from_ckpt")


def test_a_folder_of_the_tags_own_name_comes_first(tmp_path: Path) -> None:
    complete(tmp_path, 1000)
    (tmp_path / "1000").mkdir()
    (tmp_path / "1000" / INDEX_NAME).write_text("{}")
    assert find_checkpoint(tmp_path, "1000", option="--from_ckpt") == tmp_path / "1000"
    with pytest.raises(UserError, match="no complete checkpoint of that name"):
        find_checkpoint(tmp_path, "9" * 200, option="--from_ckpt")


def test_which_one_a_user_means(tmp_path: Path) -> None:
    complete(tmp_path, 2, 10)
    assert find_checkpoint(tmp_path, None, option="--from_ckpt") == folder_of_step(tmp_path, 10)
    assert find_checkpoint(folder_of_step(tmp_path, 2), None, option="--from_ckpt") == folder_of_step(tmp_path, 2)
    assert find_checkpoint(tmp_path, "step-00000002", option="--from_ckpt") == folder_of_step(tmp_path, 2)
    with pytest.raises(UserError, match=r"--tag step-3: no complete checkpoint .* step-00000002, step-00000010"):
        find_checkpoint(tmp_path, "step-3", option="--from_ckpt")
    with pytest.raises(UserError, match=r"--from_ckpt .*: no complete checkpoint there"):
        find_checkpoint(tmp_path / "nowhere", None, option="--from_ckpt")
