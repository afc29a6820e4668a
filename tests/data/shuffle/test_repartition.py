"""Repartition deals blocks to partitions by renames alone, and survives being killed."""

import dataclasses
import os
from pathlib import Path

import pyarrow.dataset
import pytest
from click.testing import CliRunner, Result

from jllm.commands.repartition import main
from jllm.data.dataset.describe import verify
from jllm.data.dataset.manifest import open_data_set, write_manifest
from jllm.data.shuffle import repartition as module
from jllm.data.shuffle.repartition import make_plan, recover, repartition
from tests.data.foreign_sets import spark_like
from tests.data.sets import content, make_set, row_numbers


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def two_sets(folder: Path) -> Path:
    make_set(folder / "a-00000", 40, files=4)
    make_set(folder / "b-00000", 20, files=2, first=100)
    return folder


def parts(folder: Path) -> list[list[str]]:
    return [sorted(path.name for path in part.iterdir()) for part in sorted(folder.iterdir()) if part.is_dir()]


def test_partition_k_holds_block_k_of_every_set(tmp_path: Path) -> None:
    folder = two_sets(tmp_path / "D")
    inodes = {path.stat().st_ino for path in folder.rglob("*.parquet")}
    result = run("-d", folder, "-n", 2)
    assert result.exit_code == 0, result.output
    assert [[name[: name.index(".")] for name in part] for part in parts(folder)] == [
        ["a-00000-00000-00000", "a-00000-00000-00002", "b-00000-00000-00000"],
        ["a-00000-00000-00001", "a-00000-00000-00003", "b-00000-00000-00001"],
    ]
    assert inodes == {path.stat().st_ino for path in folder.rglob("*.parquet")}, "files were copied"
    assert all(path.stat().st_nlink == 1 for path in folder.rglob("*.parquet"))
    assert sorted(row_numbers(folder)) == [*range(40), *range(100, 120)]
    assert sorted(os.listdir(tmp_path)) == ["D"]
    data_set = open_data_set(folder)
    assert verify(data_set) == []
    assert data_set.manifest.rows == 60
    assert data_set.manifest.tokenizer is not None
    assert [path.name for path in folder.rglob("_manifest.json")] == ["_manifest.json"]


def test_info_adds_up(tmp_path: Path) -> None:
    folder = two_sets(tmp_path / "D")
    assert run("-d", folder, "-n", 2).exit_code == 0
    info = (folder / "_data.info").read_text().splitlines()
    facts = dict(line.split(":", 1) for line in info if ":" in line)
    assert facts["Samples"].split() == ["60", "x", "6"]
    assert facts["Partitions"].strip() == "2"
    table = [line.split() for line in info if "-part-" in line]
    assert sum(int(row[2]) for row in table) == 60
    assert sum(int(row[1]) for row in table) == int(facts["Files"])
    assert table[0][0].startswith(facts["Id"].strip())


def test_pyarrow_reads_the_folder(tmp_path: Path) -> None:
    folder = two_sets(tmp_path / "D")
    assert run("-d", folder, "-n", 2).exit_code == 0
    assert pyarrow.dataset.dataset(folder).count_rows() == 60


def test_the_old_name_of_the_info(tmp_path: Path) -> None:
    """One of ours gets the new name; a file that only happens to be called so stays."""
    folder = two_sets(tmp_path / "D")
    (folder / "data.info").write_text("mine")
    assert run("-d", folder, "-n", 2).exit_code == 0
    assert (folder / "data.info").read_text() == "mine"
    for number, said in ((2, "nothing to do"), (1, "ready")):
        (folder / "_data.info").replace(folder / "data.info")
        result = run("-d", folder, "-n", number)
        assert said in result.output
        assert sorted(path.name for path in folder.iterdir() if path.is_file()) == ["_data.info", "_manifest.json"]


def test_sets_with_different_templates_are_named(tmp_path: Path) -> None:
    folder = two_sets(tmp_path / "D")
    for templates, times in (("xx", 0), ("xy", 1)):
        for name, template in zip(("a-00000", "b-00000"), templates, strict=True):
            manifest = open_data_set(folder / name).manifest
            write_manifest(folder / name, dataclasses.replace(manifest, chat_template=template))
        shown = run("-d", folder, "-n", 2, "--dry_run").output
        assert shown.count("made with different chat templates") == times


def test_sets_that_were_never_shuffled_are_named(tmp_path: Path) -> None:
    folder = two_sets(tmp_path / "D")
    make_set(folder / "c/c-00000", 40, files=4)
    make_set(folder / "c/c-00001", 40, files=4)
    spark_like(folder / "d")
    for name, command in (("a-00000", "raw2ids"), ("b-00000", "shuffle_datasets"), ("c/c-00000", "shuffle_datasets")):
        manifest = open_data_set(folder / name).manifest
        write_manifest(folder / name, dataclasses.replace(manifest, command=command))

    def named() -> list[str]:
        lines = run("-d", folder, "-n", 2, "--dry_run").output.splitlines()
        return [line for line in lines if "never shuffled" in line]

    first = named()
    assert [line.split()[3] for line in first] == ["a-00000", "c", "d"]
    assert "made by raw2ids" in first[0]
    assert "made by shuffle_datasets, test" in first[1]
    assert "made by an unknown program" in first[2]
    assert run("-d", folder, "-n", 2).exit_code == 0
    assert named() == first, "also when they are dealt again"


def test_uneven_partitions_are_said_with_figures(tmp_path: Path) -> None:
    make_set(tmp_path / "D/a", 30, files=3)
    result = run("-d", tmp_path / "D", "-n", 2, "--dry_run")
    assert "warning: partitions are uneven: from 40 to 80 tokens, 60 on average" in result.output
    make_set(tmp_path / "E/a", 30, files=3)
    make_set(tmp_path / "E/b", 30, files=3)
    result = run("-d", tmp_path / "E", "-n", 2)
    assert "partitions are uneven" not in result.output
    manifest = open_data_set(tmp_path / "E").manifest
    tokens = [sum(entry.tokens or 0 for entry in manifest.files if f"part-0000{k}" in entry.path) for k in range(2)]
    assert tokens == [120, 120]
    assert verify(open_data_set(tmp_path / "E")) == []


def test_running_again_changes_nothing(tmp_path: Path) -> None:
    folder = two_sets(tmp_path / "D")
    assert run("-d", folder, "-n", 2).exit_code == 0
    stamps = {path: path.stat().st_ctime_ns for path in folder.rglob("*")}
    again = run("-d", folder, "-n", 2)
    assert again.exit_code == 0
    assert "nothing to do" in again.output
    assert stamps == {path: path.stat().st_ctime_ns for path in folder.rglob("*")}


def test_dealing_again_to_another_number(tmp_path: Path) -> None:
    once, twice = two_sets(tmp_path / "1/D"), two_sets(tmp_path / "2/D")
    for folder, numbers in ((once, [2]), (twice, [4, 1, 3, 2])):
        for number in numbers:
            assert run("-d", folder, "-n", number).exit_code == 0
    assert content(once) == content(twice)


def test_dry_run_changes_nothing(tmp_path: Path) -> None:
    folder = two_sets(tmp_path / "D")
    before = content(folder)
    result = run("-d", folder, "-n", 2, "--dry_run")
    assert "-part-00001" in result.output
    assert content(folder) == before


def test_partitions_by_tokens(tmp_path: Path) -> None:
    folder = two_sets(tmp_path / "D")
    tokens = sum(2 + number % 5 for number in [*range(40), *range(100, 120)])
    assert make_plan(folder, None, tokens // 2).manifest.options == {"partitions": 2}
    assert make_plan(folder, None, 10 * tokens).manifest.options == {"partitions": 1}


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    folder = two_sets(tmp_path / "D")
    for arguments, said in (
        (["-n", 5], "--num_block 5"),
        (["-n", 0], "at least 1"),
        ([], "--partition_tokens"),
        (["--partition_tokens", "many"], "many"),
    ):
        result = run("-d", folder, *arguments)
        assert result.exit_code == 2
        assert said in result.stderr
        assert result.stderr.count("\n") == 1


def test_other_files_stay(tmp_path: Path) -> None:
    folder = two_sets(tmp_path / "D")
    (folder / "a-00000/README.md").write_text("mine")
    (folder / "LICENSE").write_text("ours")
    assert run("-d", folder, "-n", 2).exit_code == 0
    assert (folder / "a-00000/README.md").read_text() == "mine"
    assert (folder / "LICENSE").read_text() == "ours"


def test_same_names_in_two_sets(tmp_path: Path) -> None:
    for name, first in (("x", 0), ("y", 100)):
        make_set(tmp_path / name / "s", 10, files=2, first=first)
        (tmp_path / name / "s").rename(tmp_path / f"{name}s")
    folder = tmp_path / "D"
    folder.mkdir()
    (tmp_path / "xs").rename(folder / "xs")
    (tmp_path / "ys").rename(folder / "ys")
    assert run("-d", folder, "-n", 2).exit_code == 0
    assert sorted(row_numbers(folder)) == [*range(10), *range(100, 110)]


@pytest.mark.parametrize("at", range(12))
def test_a_kill_between_any_two_steps_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Every call that changes the disk is a moment to die in; the next run must end as an undisturbed one."""
    expected = two_sets(tmp_path / "good/D")
    assert run("-d", expected, "-n", 2).exit_code == 0
    folder = two_sets(tmp_path / "bad/D")
    left = [at]

    class Killed(BaseException):
        pass

    def mortal(function: object) -> object:
        def call(*args: object, **kwargs: object) -> object:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return function(*args, **kwargs)  # type: ignore[operator]

        return call

    with monkeypatch.context() as patch:
        for name in ("link", "rename"):
            patch.setattr(module.os, name, mortal(getattr(os, name)))
        patch.setattr(module.shutil, "rmtree", mortal(module.shutil.rmtree))
        try:
            repartition(folder, make_plan(folder, 2, None))
        except Killed:
            pass
        else:
            assert at >= 9, "fewer steps than thought"
    result = run("-d", folder, "-n", 2)
    assert result.exit_code == 0, result.output
    assert content(folder) == content(expected)
    assert sorted(os.listdir(tmp_path / "bad")) == ["D"]
    recover(folder)
    assert content(folder) == content(expected)
