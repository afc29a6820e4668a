"""`jllm inspect` shows what a set is, how long its rows are, and all that a row has."""

import dataclasses
import re
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from jllm.commands.inspect import main
from jllm.commands.manifest import main as manifest_command
from jllm.data.dataset.columns import Column
from jllm.data.dataset.manifest import open_data_set, write_manifest
from jllm.data.show import MOST_BARS, histogram
from tests.data.foreign_sets import ids, write
from tests.data.sets import make_set
from tests.data.typed_sets import make_typed_set
from tests.fixtures import write_rows


def inspect(*args: object) -> str:
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exit_code == 0, result.output
    return result.output


def test_summary(tmp_path: Path) -> None:
    output = inspect(make_set(tmp_path / "a", 50, files=3), "-n", 0)
    lines = output.splitlines()
    assert lines[0].endswith("a: 50 rows in 3 files, made by test")
    assert "  tokenizer toy, 1,000 ids" in lines
    assert "  tokens 200" in lines
    assert "column" not in output
    assert lines[-6:-5] == ["row lengths, longest 6:"]
    assert [line.split()[:4] for line in lines[-5:]] == [[str(k), "-", str(k), "10"] for k in range(2, 7)]


def test_rows_with_masked_tokens_and_padding(tmp_path: Path) -> None:
    rows = [{"input_ids": [5, 6, 7, 0], "labels": [-100, 6, 7, -100], "cu_seqlens": [0, 1, 3]}]
    output = inspect(write_rows(tmp_path / "a", rows), "-n", 1)
    assert "--- row 0: 3 tokens, 1 of them trained, 2 documents, 1 padding\n5 [[6 7 ]]((0 ))\n" in output
    colored = inspect(tmp_path / "a", "-n", 1, "--color", "always")
    assert "5 \x1b[0m\x1b[32m6 7 \x1b[0m\x1b[2m0 \x1b[0m\n" in colored


def test_trained_tokens_are_counted_as_the_manifest_counts_them(tmp_path: Path) -> None:
    rows: list[dict[str, list[int]]] = [
        {"input_ids": [5, 6, 7, 0], "labels": [5, 6, 7, -100], "cu_seqlens": [0, 1, 3]},
        {"input_ids": [5, 6], "labels": [-100, 6], "cu_seqlens": [0, 2]},
        {"input_ids": [5], "labels": [5], "cu_seqlens": [0, 1]},
    ]
    output = inspect(write_rows(tmp_path / "a", rows), "-n", 3)
    shown = [int(count) for count in re.findall(r"(\d+) of them trained", output)]
    assert shown == [1, 1, 0]
    assert "  trained_tokens 2\n" in output


def test_further_columns(tmp_path: Path) -> None:
    further = [
        Column(name="n", is_list=False),
        Column(name="texts", element="text"),
        Column(name="z", element="float32"),
    ]
    output = inspect(make_typed_set(tmp_path / "a", 9, further, files=2), "-n", 3, "--start", 4)
    for line in ("  column n int32", "  column texts list<text>", "  column z list<float32>"):
        assert line in output.splitlines()
    assert [line.split(":")[0] for line in output.splitlines() if line.startswith(("---", "n:", "texts:", "z:"))] == [
        *("--- row 4", "n", "texts", "z"),
        *("--- row 5", "n", "texts", "z"),
        *("--- row 6", "n", "texts", "z"),
    ]


def test_values_are_short_and_exact(tmp_path: Path) -> None:
    import pyarrow as pa

    columns = {
        "input_ids": ids([[1, 2]]),
        "floats": pa.array([[0.1, float("nan")]], pa.list_(pa.float32())),
        "long": pa.array([[*range(40)]]),
        "text": pa.array(['say "é"\n']),
        "meta": pa.array([{"a": 1}]),
    }
    write(tmp_path / "a/a.parquet", columns)
    output = inspect(tmp_path / "a", "-n", 1)
    assert "floats: [0.1, nan]\n" in output
    assert "15, ... 40 in all]\n" in output
    assert 'text: "say \\"é\\"\\n"\n' in output
    assert "  column meta left out: struct<a: int64> is no type" in output
    assert "\nmeta" not in output


def test_verify(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "a", 500)
    assert "verified: 1 of 1 files have a checksum" in inspect(folder, "-n", 0, "--verify")
    path = next(folder.rglob("*.parquet"))
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    result = CliRunner().invoke(main, [str(folder), "-n", "0", "--verify"])
    assert result.exit_code == 2
    assert "checksum" in result.stderr


def test_all_damaged_files_are_named(tmp_path: Path) -> None:
    """By both commands in the same words; a file that is gone and one that is new are among them."""
    folder = make_set(tmp_path / "a", 500, files=6)
    paths = open_data_set(folder).paths
    for number, place in ((0, 60), (2, 0), (3, -1)):
        data = bytearray(paths[number].read_bytes())
        data[place] ^= 1
        paths[number].write_bytes(data)
    paths[4].unlink()
    (folder / "new.parquet").write_bytes(paths[1].read_bytes())
    said = []
    for command in (main, manifest_command):
        result = CliRunner().invoke(command, [str(folder), "--verify"])
        assert result.exit_code == 2
        assert result.stderr.count("\n") == 1
        said.append(result.stderr)
        for path in (paths[0], paths[2], paths[3], paths[4], folder / "new.parquet"):
            assert str(path) in result.stderr
        assert not any(str(path) in result.stderr for path in (paths[1], paths[5]))
        assert "5 of 7 files" in result.stderr
    assert said[0] == said[1]


@pytest.mark.parametrize("command", [main, manifest_command])
def test_nothing_is_verified_without_a_checksum(tmp_path: Path, command: click.Command) -> None:
    folder = make_set(tmp_path / "D/a", 5)
    write(tmp_path / "D/b.parquet", {"input_ids": ids([[1]])})
    result = CliRunner().invoke(command, [str(tmp_path / "D"), "--verify"])
    assert result.exit_code == 2
    assert "has no _manifest.json" in result.stderr
    (tmp_path / "D/b.parquet").unlink()
    assert CliRunner().invoke(command, [str(tmp_path / "D"), "--verify"]).exit_code == 0, "each is in a set that says"
    (folder / "_manifest.json").unlink()
    assert CliRunner().invoke(command, [str(folder), "--verify"]).exit_code == 2


def test_the_header_is_for_people(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "a", 5)
    manifest = open_data_set(folder).manifest
    bad = {"no answer": {"count": 1200, "examples": ["x.jsonl:7: no answer: it ends with a question"]}}
    engine = {"name": "hf", "version": "0.22", "probes": 50, "checks": 1234, "reason": None}
    chat = {"template": "chatml", "formats": ["messages", "roles"], "date": None, "warnings": []}
    extra = {"documents": 12345, "engine": engine, "chat": chat, "bad_records": bad}
    write_manifest(folder, dataclasses.replace(manifest, extra=extra))
    lines = inspect(folder, "-n", 0).splitlines()
    assert "  documents 12,345" in lines
    assert "  engine name hf, version 0.22, probes 50, checks 1,234" in lines
    assert "  chat template chatml, formats messages; roles" in lines
    assert "  bad 1,200 x no answer; first: x.jsonl:7: no answer: it ends with a question" in lines
    assert not any(mark in "".join(lines) for mark in "{}'[]")


def test_no_manifest_is_made_by_nobody(tmp_path: Path) -> None:
    write(tmp_path / "b.parquet", {"input_ids": ids([[1]])})
    assert inspect(tmp_path, "-n", 0).splitlines()[0].endswith(": 1 rows in 1 files, no manifest")


@given(lengths=st.lists(st.one_of(st.integers(0, 20), st.integers(0, 20_000)), max_size=40))
def test_histogram(lengths: list[int]) -> None:
    """Few bars of one width, each length in its own, as many as there is room for."""
    bars = histogram(np.bincount(lengths, minlength=1).astype(np.int64))
    assert len(bars) <= MOST_BARS
    assert sum(rows for _, _, rows in bars) == len(lengths)
    assert len({last - first for first, last, _ in bars}) <= 1
    for first, last, rows in bars:
        assert rows == sum(first <= max(length, 1) <= last for length in lengths)
        assert last - first + 1 == 1 or 2 * (last - first + 1) * MOST_BARS > max(lengths)
        assert (last - first + 1) * MOST_BARS < 2 * max(lengths) or first == last


def test_start_beyond_the_end(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "a", 50, files=3)
    result = CliRunner().invoke(main, [str(folder), "--start", "99999"])
    assert result.exit_code == 2
    assert "has 50 rows; give at most 49" in result.stderr
    assert "no row 50: the last one is 49" in inspect(folder, "--start", 50)


@pytest.mark.parametrize(("start", "shown"), [(0, 2), (49, 1), (50, 0)])
def test_start_and_end(tmp_path: Path, start: int, shown: int) -> None:
    output = inspect(make_set(tmp_path / "a", 50, files=3), "-n", 2, "--start", start)
    assert output.count("--- row") == shown


def test_what_is_empty_is_not_shown(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "a", 5)
    manifest = open_data_set(folder).manifest
    chat = {
        "template": "own",
        "left_out": {},
        "unused_fields": {"score": 3},
        "warnings": [],
        "date": None,
    }
    write_manifest(folder, dataclasses.replace(manifest, extra={"chat": chat}))
    assert "  chat template own, unused fields score 3" in inspect(folder, "-n", 0).splitlines()
