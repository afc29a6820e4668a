"""Which files an input names."""

from pathlib import Path

import pytest

from jllm.data.sources.chunks import read_chunks
from jllm.data.sources.inputs import resolve
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
