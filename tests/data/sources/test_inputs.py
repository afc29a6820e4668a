"""Which files an input names."""

from pathlib import Path

import pytest

from jllm.data.sources.chunks import read_chunks
from jllm.data.sources.inputs import resolve, safe, without_password
from jllm.data.sources.parsing import parse_chunk
from jllm.errors import UserError


def test_folders_globs_and_urls(tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / ".hidden").mkdir()
    for name in ("b.jsonl", "a.txt", "deep/c.jsonl.gz", "notes.pdf", ".hidden/d.txt", "_e.txt"):
        (tmp_path / "in" / name).write_bytes(b"")
    assert [source.name for source in resolve([str(tmp_path / "in")])] == ["a.txt", "b.jsonl", "deep/c.jsonl.gz"]
    assert [source.name for source in resolve([str(tmp_path / "in" / "*.jsonl")])] == ["b.jsonl"]
    url = f"file://{tmp_path}/in/*.jsonl"
    assert [source.name for source in resolve([url])] == ["b.jsonl"]
    (tmp_path / "in" / "b.jsonl").write_text('{"text": "x"}')
    (source,) = resolve([url])
    assert [parse_chunk(block, source.kind).values for block in read_chunks(source, 0)] == [[{"text": "x"}]]
    for wrong in ("nowhere", "no*where", f"file://{tmp_path}/nowhere"):
        with pytest.raises(UserError):
            resolve([str(tmp_path / wrong) if "://" not in wrong else wrong])
    with pytest.raises(UserError, match="twice"):
        resolve([str(tmp_path / "in"), str(tmp_path / "in" / "a.txt")])


@pytest.mark.parametrize(
    ("name", "kind", "compression", "stem"),
    [
        ("a.jsonl", "jsonl", None, "a"),
        ("a.b.NDJSON.GZ", "jsonl", "gzip", "a.b"),
        ("a.md.zst", "text", "zstd", "a"),
        ("a.json.xz", "json", "xz", "a"),
        ("a.parquet", "parquet", None, "a"),
        ("a.text.bz2", "text", "bz2", "a"),
    ],
)
def test_names_say_what_a_file_is(tmp_path: Path, name: str, kind: str, compression: str | None, stem: str) -> None:
    (tmp_path / name).write_bytes(b"12345")
    (source,) = resolve([str(tmp_path / name)])
    assert (source.kind, source.compression, source.stem, source.size) == (kind, compression, stem, 5)
    (overruled,) = resolve([str(tmp_path / name)], kind="text")
    assert overruled.kind == "text"


def test_passwords_are_not_shown() -> None:
    url = "s3://user:secret@host/folder/a.jsonl?token=hidden"
    assert without_password(url) == "s3://host/folder/a.jsonl"
    assert without_password("plain/path?x") == "plain/path?x"
    assert safe(ValueError(f"cannot open {url}")) == "cannot open s3://host/folder/a.jsonl?token=hidden"
