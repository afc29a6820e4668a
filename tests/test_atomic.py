"""Folders are walked whole; JSON of ours that is something else is named; what cannot be written names its path."""

import os
import types
from pathlib import Path

import numpy as np
import pytest

from jllm import atomic
from jllm.errors import UserError, of_file_system
from tests.odd_files import DAMAGED_JSON, bare_root, files_of_at_most


def test_a_walk_follows_links_but_not_in_circles(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "file").touch()
    (tmp_path / "a" / "link").symlink_to("../beside")
    (tmp_path / "a" / "b" / "back").symlink_to("..")
    (tmp_path / "a" / "itself").symlink_to("itself")
    found = {place.relative_to(tmp_path).as_posix(): files for place, _, files in atomic.walk(tmp_path / "a")}
    assert found == {"a": ["itself"], "a/b": [], "a/link": ["file"]}


def test_a_walk_does_not_pass_over_what_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "shut").mkdir(mode=0)
    with bare_root(), pytest.raises(PermissionError, match="shut"):
        list(atomic.walk(tmp_path))
    (tmp_path / "shut").chmod(0o700)


@pytest.mark.parametrize("what", list(DAMAGED_JSON))
def test_what_is_no_object_is_named(tmp_path: Path, what: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(DAMAGED_JSON[what])
    if what == "an empty object":
        assert atomic.read_object(path, "do it again") == {}
        return
    with pytest.raises(UserError, match=r"x\.json: (not valid JSON|holds a JSON \w+ and no object).*; do it again"):
        atomic.read_object(path, "do it again")
    assert atomic.read_object(tmp_path / "not there", "") is None


def test_an_error_without_a_path_gets_that_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space") as caught, atomic.replacing(tmp_path / "x"):
        raise OSError(28, os.strerror(28))
    assert caught.value.filename == str(tmp_path / "x")
    assert not list(tmp_path.iterdir())


def _fill(folder: Path) -> None:
    with atomic.new_folder(folder) as new:
        (new / "small").write_bytes(b"0" * 100)
        (new / "large").write_bytes(b"0" * 101)


def test_a_folder_that_a_disk_does_not_take_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="too large") as caught, files_of_at_most(100):
        _fill(tmp_path / "x")
    assert caught.value.filename == str(tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_known_stays() -> None:
    with pytest.raises(FileNotFoundError) as caught, atomic.naming(Path("other")):
        Path("/there/is/none").read_bytes()
    assert caught.value.filename == "/there/is/none"


@pytest.mark.parametrize(("free", "reason"), [(0, "No space"), (1 << 30, "Input/output error")])
def test_an_array_that_is_cut_short_has_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, reason: str
) -> None:
    """numpy says how much it wrote, and not why that was not all."""
    monkeypatch.setattr("shutil.disk_usage", lambda path: types.SimpleNamespace(free=free))
    with (
        pytest.raises(OSError, match=reason) as caught,
        files_of_at_most(1000),
        atomic.replacing(tmp_path / "x") as path,
    ):
        np.zeros(5000).tofile(path)
    assert caught.value.filename == str(tmp_path / "x")
    assert of_file_system(caught.value) is not None
    assert not list(tmp_path.iterdir())


def test_what_is_no_file_system_s_keeps_its_words(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="pages are damaged"), atomic.replacing(tmp_path / "x"):
        raise OSError("pages are damaged")
