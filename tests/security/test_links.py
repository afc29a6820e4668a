"""Nothing is written, replaced or removed through a link that somebody laid."""

import ast
import contextlib
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jllm import atomic
from jllm.commands.raw2ids import main as raw2ids
from jllm.data.dataset.manifest import open_data_set
from jllm.data.prepare.reporting.bad_records import BadRecordLog
from jllm.data.prepare.workplace import BAD_RECORDS, Workplace
from jllm.data.shuffle.data_set import clean
from jllm.data.shuffle.repartition import make_plan, repartition
from jllm.data.sources.records import BadRecord
from jllm.errors import UserError
from jllm.train.checkpoint.folders import remove_checkpoint, remove_incomplete
from jllm.train.config import TrainConfig
from jllm.train.lifecycle.clean import removable_folders
from jllm.train.records.appended_file import AppendedFile
from tests.data.tokenizers_for_tests import make_byte_tokenizer
from tests.fixtures import random_rows, write_rows
from tests.security.hostile import plant_link

ROOT = Path(__file__).resolve().parents[2]
BASE = settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])


@BASE
@given(name=st.from_regex(r"[a-z._]{1,20}", fullmatch=True).filter(lambda name: name.strip(".")))
@pytest.mark.parametrize("kind", ["to a file", "to nothing", "to itself", "a hard link"])
def test_a_planted_temporary_name_is_not_written_through(tmp_path: Path, kind: str, name: str) -> None:
    target = tmp_path / "elsewhere" / "precious"
    target.parent.mkdir(exist_ok=True)
    target.write_text("precious", encoding="utf-8")
    temporary = atomic.temporary_name(tmp_path / name)
    temporary.unlink(missing_ok=True)
    if kind == "a hard link":
        os.link(target, temporary)
    else:
        temporary.symlink_to({"to a file": target, "to nothing": target.with_name("new"), "to itself": temporary}[kind])
    atomic.write_text(tmp_path / name, "ours")
    assert (tmp_path / name).read_text(encoding="utf-8") == "ours"
    assert not (tmp_path / name).is_symlink()
    assert target.read_text(encoding="utf-8") == "precious"
    assert sorted(path.name for path in target.parent.iterdir()) == ["precious"]


def test_files_written_in_place_are_no_links(tmp_path: Path) -> None:
    target = plant_link(tmp_path / "metrics.jsonl", tmp_path / "elsewhere" / "precious")
    with pytest.raises(UserError, match=r"metrics\.jsonl: is a link"):
        AppendedFile(tmp_path / "metrics.jsonl", print)
    assert target.read_text(encoding="utf-8") == "precious"
    place = Workplace(tmp_path / "out")
    place.work.mkdir(parents=True)
    plant_link(place.work / "lock", target)
    with pytest.raises(UserError, match="is a link"), place.locked():
        pass
    assert target.read_text(encoding="utf-8") == "precious"
    (place.work / "lock").unlink()
    place.work.rmdir()
    place.work.symlink_to(target.parent)
    with pytest.raises(UserError, match="is a link"), place.locked():
        pass
    assert sorted(path.name for path in target.parent.iterdir()) == ["precious"]


@pytest.mark.parametrize("what", ["the folder", "a split"])
def test_starting_over_removes_nothing_through_a_link(tmp_path: Path, what: str) -> None:
    other = write_rows(tmp_path / "other", random_rows(6), files=2)
    if what == "the folder":
        (tmp_path / "out").symlink_to(other)
    else:
        write_rows(tmp_path / "out", random_rows(6), files=2)
        for path in (tmp_path / "out" / "set-00000").iterdir():
            path.unlink()
        (tmp_path / "out" / "set-00000").rmdir()
        (tmp_path / "out" / "set-00000").symlink_to(other / "set-00000")
    place = Workplace(tmp_path / "out")
    refused = pytest.raises(UserError, match="is a link") if what == "the folder" else contextlib.nullcontext()
    with refused, place.locked():
        place.clean()
    open_data_set(other)


def test_a_shuffled_set_that_is_a_link_is_not_removed(tmp_path: Path) -> None:
    other = write_rows(tmp_path / "other", random_rows(6), files=2)
    (tmp_path / "out").symlink_to(other)
    with pytest.raises(UserError, match="is a link"):
        clean(tmp_path / "out")
    open_data_set(other)


@pytest.mark.parametrize("kind", ["relative", "absolute", "within", "a linked set"])
def test_repartition_of_links_leaves_whole_shards(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "all"
    if kind == "a linked set":
        write_rows(tmp_path / "far" / "one", random_rows(8), files=4)
        folder.mkdir()
        (folder / "one").symlink_to("../far/one")
    else:
        write_rows(folder / "one", random_rows(8), files=4)
        for path in sorted((folder / "one" / "set-00000").iterdir()):
            away = (folder / "one" / "_kept" if kind == "within" else tmp_path / "far") / path.name
            away.parent.mkdir(exist_ok=True)
            path.rename(away)
            path.symlink_to(away if kind == "absolute" else os.path.relpath(away, path.parent))
    assert repartition(folder, make_plan(folder, 2, None))
    found = open_data_set(folder)
    assert found.manifest.rows == 8
    assert len(found.paths) == 4
    assert all(path.is_file() for path in found.paths)


@pytest.mark.parametrize("target", ["empty", "missing"])
def test_a_linked_split_and_a_linked_log_are_not_written_through(tmp_path: Path, target: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    if target == "empty":
        elsewhere.mkdir()
    (tmp_path / "in.jsonl").write_text('{"text": "a b"}\n' * 3, encoding="utf-8")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "in-00000").symlink_to(elsewhere)
    tokenizer = make_byte_tokenizer(tmp_path / "bytes")
    places = ["-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out"), "--tokenizer", str(tokenizer)]
    with pytest.raises(UserError, match="in-00000 in it is a link"):
        raw2ids.callback(**raw2ids.make_context("raw2ids", [*places, "--type", "pretrain", "--cores", "1"]).params)
    (tmp_path / BAD_RECORDS).symlink_to(elsewhere / "new")
    with pytest.raises(UserError, match="is a link"):
        BadRecordLog(tmp_path).add((0, 0), "x", [BadRecord(kind="bad JSON", line=1, detail="x")])
    assert not elsewhere.exists() or not list(elsewhere.iterdir())


@pytest.mark.parametrize("option", ["checkpoint", "output_dir", "log_dir"])
def test_a_run_that_starts_over_empties_no_linked_folder(tmp_path: Path, option: str) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "other")
    folders: dict[str, Any] = {"output_dir": tmp_path / "output", option: tmp_path / "run"}
    config = TrainConfig(model=tmp_path / "model", train_data=(str(tmp_path / "data"),), **folders)
    with pytest.raises(UserError, match=r"--clean: .*/run is a link"):
        removable_folders(config)
    (tmp_path / "run").unlink()
    assert tmp_path / "run" in removable_folders(config)


def test_checkpoints_that_are_links_lose_the_link_alone(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name in ("index.json", "x"):
        (other / name).write_text("precious", encoding="utf-8")
    (tmp_path / "step-5").symlink_to(other)
    (tmp_path / ".step-6.tmp").symlink_to(other)
    remove_checkpoint(tmp_path / "step-5")
    remove_incomplete(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]
    assert sorted(path.name for path in other.iterdir()) == ["index.json", "x"]


def test_temporary_names_are_opened_by_atomic_alone() -> None:
    """A module that makes a file of a temporary name of its own does so through `atomic.create`, or exclusively."""
    wrong = []
    for path in sorted((ROOT / "jllm").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if path.name == "atomic.py" or "spark" in path.parts:
            continue
        for node in ast.walk(ast.parse(text)):
            makes = isinstance(node, ast.JoinedStr) and ast.unparse(node).endswith((".tmp'", '.tmp"'))
            if makes and "atomic.create(" not in text and '.open("x"' not in text:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not wrong
