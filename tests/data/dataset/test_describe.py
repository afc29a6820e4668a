"""`jllm manifest` of folders that others wrote: what it counts, what it says of columns, what it finds odd."""

from pathlib import Path

import pyarrow as pa
import pytest
from click.testing import CliRunner, Result

from jllm.commands.manifest import main as manifest_command
from jllm.data.dataset.columns import INPUT_IDS
from jllm.data.dataset.manifest import open_data_set, read_manifest
from jllm.errors import UserError
from tests.data.foreign_sets import ids, spark_like, write
from tests.data.sets import make_set


def run(command: object, *args: object) -> Result:
    return CliRunner().invoke(command, [str(arg) for arg in args])  # type: ignore[arg-type]


def test_spark_folder(tmp_path: Path) -> None:
    folder = spark_like(tmp_path / "D/set")
    opened = open_data_set(folder)
    assert opened.manifest.rows == 4
    assert opened.manifest.total("tokens") is None
    result = run(manifest_command, folder)
    assert result.exit_code == 0, result.output
    assert "warning" not in result.output
    manifest = read_manifest(folder)
    assert manifest is not None
    assert manifest.total("tokens") == 14
    # [9, 9], [9] of the first file; 9, 8, 7 with labels; 5 tokens of two documents
    assert manifest.total("trained_tokens") == 3 + 3 + 3
    assert open_data_set(folder).manifest == manifest
    assert run(manifest_command, folder, "--verify").exit_code == 0


def test_missing_success_is_a_warning(tmp_path: Path) -> None:
    folder = spark_like(tmp_path / "set")
    (folder / "_SUCCESS").unlink()
    result = run(manifest_command, folder)
    assert result.exit_code == 0
    assert "without _SUCCESS" in result.output


def test_manifest_of_changed_files_is_made_anew(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "set", 10, files=2)
    next(folder.rglob("*-00001.zstd.parquet")).unlink()
    with pytest.raises(UserError, match="listed in the manifest"):
        open_data_set(folder)
    assert run(manifest_command, folder).exit_code == 0
    manifest = open_data_set(folder).manifest
    assert manifest.rows == 5
    assert manifest.tokenizer is not None, "the tokenizer of the old manifest was kept"


def test_verify_finds_a_changed_byte(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "set", 1000)
    path = next(folder.rglob("*.parquet"))
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    result = run(manifest_command, folder, "--verify")
    assert result.exit_code == 2
    assert path.name in result.stderr


def test_further_columns_are_described(tmp_path: Path) -> None:
    columns = {
        INPUT_IDS: ids([[1, 2], [3]]),
        "ref_logps": pa.array([[-0.5], []], pa.list_(pa.float64())),
        "url": pa.array(["a", "b"]),
        "meta": pa.array([{"a": 1}, {"a": 2}]),
    }
    write(tmp_path / "set/a.parquet", columns)
    result = run(manifest_command, tmp_path / "set")
    assert result.exit_code == 0, result.output
    assert "column ref_logps: list<float32>\n" in result.output
    assert "when rows are rewritten, column ref_logps is double: it is rounded to float32" in result.output
    assert "when rows are rewritten, column meta is left out: struct<a: int64> is no type" in result.output
    manifest = read_manifest(tmp_path / "set")
    assert manifest is not None
    assert manifest.to_json()["columns"] == {"ref_logps": "list<float32>", "url": "text"}
    assert [*manifest.to_json()["columns_left_out"]] == ["meta"]


def test_nulls_in_a_further_column_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "set/a.parquet", {INPUT_IDS: ids([[1]] * 3), "url": pa.array(["a", "b", None])})
    result = run(manifest_command, tmp_path / "set")
    assert result.exit_code == 2
    assert "a.parquet: row group 0: column url: row 2 is null" in result.stderr
    assert result.stderr.count("\n") == 1
