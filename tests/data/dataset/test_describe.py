"""`jllm manifest` of folders that others wrote: what it counts, what it says of columns, what it finds odd."""

import dataclasses
import json
from pathlib import Path

import pyarrow as pa
import pytest
from click.testing import CliRunner, Result

from jllm.commands.manifest import main as manifest_command
from jllm.data.dataset.columns import INPUT_IDS
from jllm.data.dataset.describe import describe
from jllm.data.dataset.manifest import MANIFEST_NAME, Tokenizer, open_data_set, read_manifest, write_manifest
from jllm.data.tokenizer.facts import load_tokenizer
from jllm.errors import UserError
from tests.data.foreign_sets import ids, spark_like, write
from tests.data.sets import TOKENIZER, make_set
from tests.fixtures import write_rows


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
    assert run(manifest_command, folder, "--force").exit_code == 0
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


def test_a_manifest_is_replaced_by_force_alone(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "set", 10)
    before = (folder / MANIFEST_NAME).read_bytes()
    refused = run(manifest_command, folder)
    assert refused.exit_code == 2
    assert "--force" in refused.stderr
    assert (folder / MANIFEST_NAME).read_bytes() == before
    (folder / MANIFEST_NAME).write_text("{")
    assert run(manifest_command, folder).exit_code == 2, "not one that is broken either"
    assert run(manifest_command, folder, "--force").exit_code == 0
    manifest = open_data_set(folder).manifest
    assert manifest.command == "manifest"
    write_manifest(folder, dataclasses.replace(manifest, chat_template="{{ x }}"))
    assert run(manifest_command, folder, "--force").exit_code == 0
    assert open_data_set(folder).manifest.chat_template == "{{ x }}"
    assert run(manifest_command, folder, "--force", "--verify").exit_code == 2


def test_run_again_it_changes_nothing(tmp_path: Path, byte_tokenizer: Path) -> None:
    """As after a kill that came when all was done; what would make another manifest is refused."""
    for words in ([], ["--tokenizer", byte_tokenizer]):
        folder = spark_like(tmp_path / f"set-{len(words)}")
        assert run(manifest_command, folder, *words).exit_code == 0
        made = (folder / MANIFEST_NAME).read_bytes()
        for again in (words, []):
            assert run(manifest_command, folder, *again).exit_code == 0
            assert (folder / MANIFEST_NAME).read_bytes() == made
        write(folder / "lang=fr/part-00000-c3.c000.snappy.parquet", {INPUT_IDS: ids([[1, 2]])})
        refused = run(manifest_command, folder)
        assert refused.exit_code == 2
        assert "--force" in refused.stderr
        assert (folder / MANIFEST_NAME).read_bytes() == made


def test_sub_folders_that_are_data_sets_are_a_warning(tmp_path: Path) -> None:
    make_set(tmp_path / "D/a", 10)
    make_set(tmp_path / "D/b", 10)
    result = run(manifest_command, tmp_path / "D")
    assert result.exit_code == 0
    assert "warning" in result.output
    assert "2 of its sub-folders are data sets of their own (a, ...)" in result.output
    manifest = read_manifest(tmp_path / "D")
    assert manifest is not None
    assert manifest.tokenizer == TOKENIZER, "that of its sets"


def test_ids_are_those_of_the_tokenizer(tmp_path: Path, byte_tokenizer: Path) -> None:
    """Of the one that is given, and of the one that the sets name."""
    size = load_tokenizer(str(byte_tokenizer)).vocab_size
    write(tmp_path / "a/a.parquet", {INPUT_IDS: ids([[1], [2, size - 1]])})
    write(tmp_path / "b/b.parquet", {INPUT_IDS: ids([[1], [2, size]])})
    assert run(manifest_command, tmp_path / "a", "--tokenizer", byte_tokenizer).exit_code == 0
    manifest = read_manifest(tmp_path / "a")
    assert manifest is not None
    assert manifest.to_json()["largest_id"] == size - 1
    refused = run(manifest_command, tmp_path / "b", "--tokenizer", byte_tokenizer)
    assert refused.exit_code == 2
    assert f"b.parquet: row 1 has the id {size}" in refused.stderr
    assert read_manifest(tmp_path / "b") is None
    make_set(tmp_path / "c", 2000, tokenizer=TOKENIZER)  # its ids go up to 1999
    refused = run(manifest_command, tmp_path / "c", "--force")
    assert refused.exit_code == 2
    assert "toy has the ids 0 to 999" in refused.stderr


def test_an_older_manifest_gets_what_is_recorded_today(tmp_path: Path, byte_tokenizer: Path) -> None:
    """As a set of before: no facts but the hash, no largest id, nothing said of labels."""
    facts = load_tokenizer(str(byte_tokenizer))
    assert facts.eos_id is not None
    rows = [{INPUT_IDS: [5, 6, facts.eos_id, 7, facts.eos_id, 8], "cu_seqlens": [0, 3, 5, 6]}]
    folder = write_rows(tmp_path / "a", rows)
    newest = open_data_set(folder).manifest
    old = dataclasses.replace(
        newest,
        command="raw2ids",
        options={"max_len": 9},
        tokenizer=Tokenizer(name="it", vocab_size=facts.vocab_size, sha256=facts.sha256),
        files=tuple(dataclasses.replace(entry, largest_id=None) for entry in newest.files),
        extra={"documents": 7},
    )
    write_manifest(folder, old)
    assert run(manifest_command, folder, "--tokenizer", byte_tokenizer).exit_code == 0
    new = open_data_set(folder).manifest
    wanted = dataclasses.replace(facts.for_manifest, document_end=facts.eos_id)
    assert new == dataclasses.replace(old, tokenizer=wanted, files=newest.files, labels_checked=True)
    assert new.fingerprint == old.fingerprint
    written = json.loads((folder / MANIFEST_NAME).read_text())
    assert written["labels_checked"] is True
    assert written["largest_id"] == max(rows[0][INPUT_IDS])
    assert written["tokenizer"]["probe_ids"]["a"] == list(facts.probe_ids[facts.probes.index("a")])
    assert run(manifest_command, folder, "--tokenizer", byte_tokenizer).exit_code == 0, "once more"
    write_manifest(folder, dataclasses.replace(old, tokenizer=TOKENIZER))
    refused = run(manifest_command, folder, "--tokenizer", byte_tokenizer)
    assert refused.exit_code == 2
    assert "was made with another (toy" in refused.stderr


def test_a_damaged_file_gets_no_facts(tmp_path: Path, byte_tokenizer: Path) -> None:
    folder = make_set(tmp_path / "a", 100, tokenizer=None)
    (path,) = open_data_set(folder).paths
    manifest = open_data_set(folder).manifest
    entries = [dataclasses.replace(entry, sha256="0" * 64) for entry in manifest.files]
    write_manifest(folder, dataclasses.replace(manifest, files=tuple(entries)))
    refused = run(manifest_command, folder, "--tokenizer", byte_tokenizer)
    assert refused.exit_code == 2
    assert f"{path}: the content does not match its checksum" in refused.stderr


@pytest.mark.parametrize(
    ("rows", "end"),
    [
        ([[1, 9], [2, 9]], 9),
        ([[1, 9], [2, 3]], None),
        ([[1, 4], [2, 4]], None),
        ([[], [2, 9]], 9),
    ],
)
def test_the_end_of_documents_is_seen(tmp_path: Path, rows: list[list[int]], end: int | None) -> None:
    """The special id that most of them end in, whoever wrote them; none where there is none."""
    write(tmp_path / "a.parquet", {INPUT_IDS: ids(rows)})
    manifest = describe(tmp_path, cores=1, tokenizer=TOKENIZER, special_ids={9, 8})
    assert manifest.tokenizer is not None
    assert manifest.tokenizer.document_end == end
