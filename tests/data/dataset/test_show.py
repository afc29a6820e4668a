"""`jllm inspect` shows what a set is, how long its rows are, and all that a row has."""

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from jllm.commands.inspect import main
from jllm.data.dataset.columns import Column
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
    assert lines[-1].split()[:4] == ["1", "-", "512", "50"]


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


@pytest.mark.parametrize(("start", "shown"), [(0, 2), (49, 1), (50, 0)])
def test_start_and_end(tmp_path: Path, start: int, shown: int) -> None:
    output = inspect(make_set(tmp_path / "a", 50, files=3), "-n", 2, "--start", start)
    assert output.count("--- row") == shown
