"""Folders are tried: what cannot be written to is named with its reason, what can is as it was."""

from pathlib import Path

import pytest

from jllm.errors import UserError
from jllm.train.checks.folders import check_folders
from jllm.train.config import TrainConfig
from tests.odd_files import bare_root


def config_of(**folders: Path) -> TrainConfig:
    return TrainConfig(model=Path("model"), train_data=("data",), **folders)  # type: ignore[arg-type]


@pytest.mark.parametrize("option", ["checkpoint", "output_dir", "log_dir"])
def test_reasons(tmp_path: Path, option: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for place, reason in {
        "file": f"{tmp_path}/file is a file",
        "file/a/b": f"{tmp_path}/file, which is above it, is a file",
        "link": "is a link to .*gone, which is not there",
        "a/" + "b" * 256: "File name too long",
    }.items():
        with pytest.raises(UserError, match=f"^--{option} {tmp_path}/{place}: cannot be written to: .*{reason}"):
            check_folders(config_of(**{option: tmp_path / place}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_log_folder_inside_the_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/log").touch()
    with pytest.raises(UserError, match=f"--log_dir {tmp_path}/run/log: .* is a file"):
        check_folders(config_of(checkpoint=tmp_path / "run"))


def test_rights(tmp_path: Path) -> None:
    folder = tmp_path / "shut"
    folder.mkdir(mode=0o555)
    with bare_root(), pytest.raises(UserError, match="Permission denied"):
        check_folders(config_of(checkpoint=folder / "run"))


def test_good_folders_are_as_they_were(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "also").symlink_to(tmp_path / "there")
    config = config_of(checkpoint=tmp_path / "also/run", output_dir=tmp_path / "a/b/c", log_dir=tmp_path / "there")
    check_folders(config)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["also", "there"]
