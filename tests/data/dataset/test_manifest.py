"""Manifests: what they say is read back, what was changed is noticed, and several sets are one."""

import dataclasses
import json
from pathlib import Path

import pytest

from jllm.data.dataset.columns import Column
from jllm.data.dataset.describe import verify
from jllm.data.dataset.further import FurtherColumns
from jllm.data.dataset.manifest import (
    MANIFEST_NAME,
    Manifest,
    data_sets_below,
    one_tokenizer,
    open_data_set,
    read_manifest,
    write_manifest,
)
from jllm.errors import UserError
from tests.data.sets import TOKENIZER, make_set
from tests.data.typed_sets import EVERY_TYPE, make_typed_set


def edit(folder: Path, **changes: object) -> None:
    path = folder / MANIFEST_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    manifest = open_data_set(make_typed_set(tmp_path / "a", 20, EVERY_TYPE, files=2)).manifest
    full = dataclasses.replace(
        manifest,
        sources=({"name": "x", "fingerprint": "y"},),
        extra={"mix": {"rows": 3}},
        further=FurtherColumns(carried=tuple(sorted(EVERY_TYPE)), left_out={"meta": "a struct"}),
    )
    write_manifest(tmp_path, full)
    assert read_manifest(tmp_path) == full
    assert full.fingerprint == manifest.fingerprint, "the data's alone"


def test_keys_are_there_only_where_there_are_further_columns(tmp_path: Path) -> None:
    plain = open_data_set(make_set(tmp_path / "a", 5)).manifest.to_json()
    assert list(plain) == [
        *("format", "made_by", "tokenizer", "rows", "tokens", "trained_tokens", "longest_row"),
        *("sources", "fingerprint", "files"),
    ]
    typed = open_data_set(make_typed_set(tmp_path / "b", 5, EVERY_TYPE)).manifest.to_json()
    assert typed["columns"] == {column.name: column.type_name for column in sorted(EVERY_TYPE)}
    assert "columns_left_out" not in typed


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": 9}, "manifest format 9"),
        ({"fingerprint": "0"}, "was edited"),
        ({"files": [{"path": "x"}]}, "not a jllm manifest"),
        ({"columns": {"x": "list<double>"}}, "unknown type 'list<double>'"),
    ],
)
def test_edited_manifests(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    edit(make_set(tmp_path / "a", 5), **changes)
    with pytest.raises(UserError, match=said):
        open_data_set(tmp_path / "a")


def test_files_added_changed_or_gone(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "a", 30, files=3)
    paths = open_data_set(folder).paths
    (folder / "more.parquet").write_bytes(paths[0].read_bytes())
    with pytest.raises(UserError, match=r"more\.parquet is not in its manifest"):
        open_data_set(folder)
    (folder / "more.parquet").unlink()
    data = paths[1].read_bytes()
    paths[1].write_bytes(paths[0].read_bytes())
    with pytest.raises(UserError, match=r"00001\.zstd\.parquet: changed since"):
        open_data_set(folder)
    paths[1].write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    (problem,) = verify(open_data_set(folder))
    assert "does not match its checksum" in problem
    paths[1].unlink()
    with pytest.raises(UserError, match="listed in the manifest and not there"):
        open_data_set(folder)


def test_a_folder_of_sets_is_a_set(tmp_path: Path) -> None:
    make_typed_set(tmp_path / "D/a", 10, EVERY_TYPE, files=2)
    make_typed_set(tmp_path / "D/b", 5, EVERY_TYPE[2:], first=50)
    (tmp_path / "D/b" / MANIFEST_NAME).unlink()
    both = open_data_set(tmp_path / "D")
    assert both.manifest.rows == 15
    assert both.manifest.total("tokens") is None, "nobody counted those of b"
    assert both.manifest.longest_row is None
    assert both.manifest.tokenizer == TOKENIZER
    assert both.manifest.further.carried == tuple(sorted(EVERY_TYPE[2:]))
    assert {*both.manifest.further.left_out} == {column.name for column in EVERY_TYPE[:2]}
    assert [data_set.name for data_set in data_sets_below(tmp_path / "D")] == ["a", "b"]
    assert [data_set.name for data_set in data_sets_below(tmp_path / "D/a")] == ["a"]


def test_tokenizers_are_compared_by_what_they_do(tmp_path: Path) -> None:
    """A backend that another version of the library wrote otherwise is the same where vocabulary and probes are."""
    known = dataclasses.replace(TOKENIZER, vocabulary_sha256="v", probe_ids={"a": [1]})
    rewritten = dataclasses.replace(known, sha256="1" * 64)
    assert known.is_same(rewritten)
    assert known.is_same(TOKENIZER)
    for change in ({"vocabulary_sha256": "w"}, {"probe_ids": {"a": [2]}}, {"probe_ids": None}):
        assert not known.is_same(dataclasses.replace(rewritten, **change))  # type: ignore[arg-type]
    make_set(tmp_path / "D/a", 5, tokenizer=known)
    make_set(tmp_path / "D/b", 5, tokenizer=rewritten)
    assert open_data_set(tmp_path / "D").manifest.tokenizer == known
    write_manifest(tmp_path / "D/a", open_data_set(tmp_path / "D/a").manifest)
    assert open_data_set(tmp_path / "D/a").manifest.tokenizer == known, "read back"


def test_one_tokenizer(tmp_path: Path) -> None:
    other = dataclasses.replace(TOKENIZER, name="other", sha256="1" * 64)
    sets = [
        open_data_set(make_set(tmp_path / "D/a", 5)),
        open_data_set(make_set(tmp_path / "D/b", 5, tokenizer=None)),
        open_data_set(make_set(tmp_path / "D/c", 5, tokenizer=other)),
    ]
    assert one_tokenizer(sets[:2]) == TOKENIZER
    assert one_tokenizer(sets[1:2]) is None
    with pytest.raises(UserError, match="different tokenizers"):
        one_tokenizer(sets)
    with pytest.raises(UserError, match="different tokenizers"):
        open_data_set(tmp_path / "D")


def test_fingerprints_follow_names_rows_and_content(tmp_path: Path) -> None:
    entries = open_data_set(make_set(tmp_path / "a", 30, files=2)).manifest.files

    def of(*files: object) -> str:
        return Manifest(command="x", options={}, files=files).fingerprint  # type: ignore[arg-type]

    known = {
        of(*entries),
        of(*entries[::-1]),
        of(entries[0]),
        of(dataclasses.replace(entries[0], path="y")),
        of(dataclasses.replace(entries[0], sha256="0")),
        of(dataclasses.replace(entries[0], sha256=None)),
    }
    assert len(known) == 6
    assert of(dataclasses.replace(entries[0], bytes=1)) == of(entries[0])


@pytest.mark.parametrize("name", ["absent", "empty"])
def test_nothing_there(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    for opened in (open_data_set, data_sets_below):
        with pytest.raises(UserError, match=r"no such folder|no Parquet shards"):
            opened(tmp_path / name)


def test_further_columns_of_one_name(tmp_path: Path) -> None:
    """Two sets that agree on a name and not on its type."""
    make_typed_set(tmp_path / "D/a", 5, [Column(name="x")])
    make_typed_set(tmp_path / "D/b", 5, [Column(name="x", element="text")])
    assert open_data_set(tmp_path / "D").manifest.further.left_out == {"x": "it is list<int32> in a, list<text> in b"}
