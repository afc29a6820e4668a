"""The commands: every set of a folder, or all of it as one; what is in the way is refused."""

import dataclasses
from pathlib import Path

import pyarrow as pa
import pytest
from click.testing import CliRunner, Result

from jllm.commands.manifest import main as describe
from jllm.commands.repartition import main as repartition
from jllm.commands.shuffle_datasets import main as shuffle_datasets
from jllm.commands.shuffle_partition import main as shuffle_partition
from jllm.data.dataset.manifest import Tokenizer, open_data_set, read_manifest, write_manifest
from tests.data.foreign_sets import ids, write
from tests.data.sets import make_set, row_numbers


def run(command: object, *args: object) -> Result:
    return CliRunner().invoke(command, [str(arg) for arg in args])  # type: ignore[arg-type]


def test_command_shuffles_every_set(tmp_path: Path) -> None:
    make_set(tmp_path / "D/a", 50, files=3)
    make_set(tmp_path / "D/b", 20, files=2, first=1000)
    result = run(shuffle_datasets, "-d", tmp_path / "D", "--cores", 2)
    assert result.exit_code == 0, result.output
    assert sorted(path.relative_to(tmp_path / "D-sf").as_posix() for path in (tmp_path / "D-sf").rglob("*.*")) == [
        *["a-00000/_manifest.json"],
        *[f"a-00000/a-00000-0000{k}.zstd.parquet" for k in range(3)],
        *["b-00000/_manifest.json"],
        *[f"b-00000/b-00000-0000{k}.zstd.parquet" for k in range(2)],
    ]
    assert row_numbers(tmp_path / "D-sf/a-00000") != list(range(50))
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "D-sf").rglob("*.parquet")}
    again = run(shuffle_datasets, "-d", tmp_path / "D", "--cores", 1)
    assert again.exit_code == 0
    assert again.output.count("already shuffled") == 2
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "D-sf").rglob("*.parquet")}


def test_other_options_are_refused_until_clean(tmp_path: Path) -> None:
    make_set(tmp_path / "D/a", 50, files=3)
    assert run(shuffle_datasets, "-d", tmp_path / "D").exit_code == 0
    refused = run(shuffle_datasets, "-d", tmp_path / "D", "--seed", 2)
    assert refused.exit_code == 2
    assert "--clean" in refused.stderr
    assert refused.stderr.count("\n") == 1
    cleaned = run(shuffle_datasets, "-d", tmp_path / "D", "--seed", 2, "-n", 2, "-C")
    assert cleaned.exit_code == 0, cleaned.output
    manifest = read_manifest(tmp_path / "D-sf/a-00000")
    assert manifest is not None
    assert manifest.options == {"seed": 2, "blocks": 2}


def test_foreign_output_folder_is_never_touched(tmp_path: Path) -> None:
    make_set(tmp_path / "D/a", 5)
    (tmp_path / "D-sf/a-00000").mkdir(parents=True)
    (tmp_path / "D-sf/a-00000/thesis.txt").write_text("mine")
    for flag in ([], ["-C"]):
        refused = run(shuffle_datasets, "-d", tmp_path / "D", *flag)
        assert refused.exit_code == 2
        assert "not empty" in refused.stderr
    assert (tmp_path / "D-sf/a-00000/thesis.txt").read_text() == "mine"


def test_missing_output_is_noticed(tmp_path: Path) -> None:
    make_set(tmp_path / "D/a", 50, files=3)
    assert run(shuffle_datasets, "-d", tmp_path / "D").exit_code == 0
    next((tmp_path / "D-sf").rglob("*-00001.zstd.parquet")).unlink()
    result = run(shuffle_datasets, "-d", tmp_path / "D")
    assert result.exit_code == 2
    assert "listed in the manifest and not there" in result.stderr


def test_an_empty_data_set(tmp_path: Path) -> None:
    make_set(tmp_path / "D/a", 0, files=0)
    result = run(shuffle_datasets, "-d", tmp_path / "D")
    assert result.exit_code == 0, result.output
    assert open_data_set(tmp_path / "D-sf/a-00000").manifest.rows == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-n", "0"], "--num_block 0"),
        (["--memory", "lots"], "--memory lots"),
        (["--memory", "1K"], "--memory 1K: that is 1,024 bytes; give at least 16 MiB"),
        (["--mix", "a=1", "--mix", "a=2"], "--mix: a has 2 values; give one"),
        (["--mix", "source:x=1", "--mix", "source:x=1"], "--mix: source:x has 2 values"),
        (["--max_tokens", "a=1K", "--max_tokens", "9", "--max_tokens", "a=2K"], "--max_tokens: a has 2 values"),
        (["--max_tokens", "9", "--max_tokens", "9"], "--max_tokens: all data sets have 2 values"),
        (["--mem_rate", "2"], "--mem_rate"),
        (["--cores", "0"], "--cores 0"),
        (["-o", "D/inside"], "beside it"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    make_set(tmp_path / "D/a", 5)
    result = run(shuffle_datasets, "-d", "D", *arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


def test_damaged_input_names_the_file(tmp_path: Path) -> None:
    make_set(tmp_path / "D/a", 5000, files=2)
    path = tmp_path / "D/a/a-00000/a-00000-00001.zstd.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    result = run(shuffle_datasets, "-d", tmp_path / "D")
    assert result.exit_code == 2
    assert path.name in result.stderr
    assert result.stderr.count("\n") == 1


def test_every_byte_is_checked(tmp_path: Path) -> None:
    """Also those that no reader of the rows needs; and a set that is refused leaves nothing behind."""
    make_set(tmp_path / "D/a", 500, files=3)
    path = tmp_path / "D/a/a-00000/a-00000-00001.zstd.parquet"
    good = path.read_bytes()
    for place in (*range(40), *range(40, len(good), 37), *range(-12, 0)):
        data = bytearray(good)
        data[place] ^= 1
        path.write_bytes(data)
        result = run(shuffle_datasets, "-d", tmp_path / "D")
        assert result.exit_code == 2, place
        assert path.name in result.stderr
        assert result.stderr.count("\n") == 1
        assert [each.name for each in tmp_path.iterdir()] == ["D"]
    path.write_bytes(good)
    assert run(shuffle_datasets, "-d", tmp_path / "D").exit_code == 0


def test_bytes_of_columns_that_are_left_out_are_checked(tmp_path: Path) -> None:
    """A file of another writer, without checksums in its pages: what its manifest says of the whole file counts."""
    rows = {"input_ids": ids([[1, 2]] * 50), "meta": pa.array([{"a": number} for number in range(50)])}
    path = write(tmp_path / "D/a/a.parquet", rows, compression="none")
    assert run(describe, tmp_path / "D/a").exit_code == 0
    data = bytearray(path.read_bytes())
    place = data.index((41).to_bytes(8, "little"))  # an element of the column that is left out
    data[place] ^= 1
    path.write_bytes(data)
    result = run(shuffle_datasets, "-d", tmp_path / "D")
    assert result.exit_code == 2
    assert f"{path}: the content does not match its checksum" in result.stderr


def test_a_file_without_its_magic_is_none(tmp_path: Path) -> None:
    path = write(tmp_path / "D/a/a.parquet", {"input_ids": ids([[1, 2]] * 50)})
    path.write_bytes(b"PAR2" + path.read_bytes()[4:])
    result = run(shuffle_datasets, "-d", tmp_path / "D")
    assert result.exit_code == 2
    assert f"{path}: not a complete Parquet file" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "files"),
    [
        (["-n", 1000], {"a": 30, "b": 1000}),
        (["-n", 20], {"a": 20, "b": 20}),
        (["-n", 1000, "--mix", "a=0.5", "--mix", "b=0.01"], {"a": 15, "b": 20}),
    ],
)
def test_no_more_files_than_rows(tmp_path: Path, arguments: list[object], files: dict[str, int]) -> None:
    make_set(tmp_path / "D/a", 30)
    make_set(tmp_path / "D/b", 2000)
    result = run(shuffle_datasets, "-d", tmp_path / "D", *arguments)
    assert result.exit_code == 0, result.output
    for name, count in files.items():
        folder = tmp_path / f"D-sf/{name}-00000"
        assert len(list(folder.rglob("*.parquet"))) == count
        assert all(entry.rows for entry in open_data_set(folder).manifest.files)
        warned = f"warning: {name}: {count:,} rows are dealt to {count:,} files, not 1,000" in result.output
        assert warned == (count < 1000 and 1000 in arguments)
    again = run(shuffle_datasets, "-d", tmp_path / "D", *arguments)
    assert again.exit_code == 0
    assert again.output.count("already shuffled") == 2


def test_what_is_known_of_a_set_goes_with_it(tmp_path: Path) -> None:
    """Through shuffle and repartition: tokenizer with its facts, the template of its conversations, the largest id."""
    known = Tokenizer(
        name="it", vocab_size=1000, sha256="1", vocabulary_sha256="2", probe_ids={"a": [1]}, document_end=3
    )
    for name, template in (("a", "{{ x }}"), ("b", None)):
        folder = make_set(tmp_path / "D" / name, 40, files=2, tokenizer=known)
        manifest = open_data_set(folder).manifest
        write_manifest(folder, dataclasses.replace(manifest, labels_checked=True, chat_template=template))
    assert run(shuffle_datasets, "-d", tmp_path / "D").exit_code == 0
    assert run(repartition, "-d", tmp_path / "D-sf", "-n", 2).exit_code == 0
    for folder in (tmp_path / "D", tmp_path / "D-sf"):
        manifest = open_data_set(folder).manifest
        assert manifest.tokenizer == known
        assert manifest.chat_template == "{{ x }}"
        assert manifest.labels_checked
        assert manifest.largest_id == 39


def test_shuffle_partition_mixes_sets(tmp_path: Path) -> None:
    make_set(tmp_path / "D/a", 500, files=3)
    make_set(tmp_path / "D/b", 500, files=2, first=500)
    result = run(shuffle_partition, "-d", tmp_path / "D", "-o", tmp_path / "E")
    assert result.exit_code == 0, result.output
    rows = row_numbers(tmp_path / "E/D-00000")
    assert sorted(rows) == list(range(1000))
    assert 150 < sum(number < 500 for number in rows[:500]) < 350
    assert len(list((tmp_path / "E").rglob("*.parquet"))) == 5
