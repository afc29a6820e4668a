"""Chunks on their way to another process."""

import dataclasses
import gzip
import json
import pickle
from pathlib import Path

import pytest

from jllm.data.sources import chunks
from jllm.data.sources.chunks import read_chunks
from jllm.data.sources.inputs import resolve
from jllm.errors import UserError


@pytest.mark.parametrize("name", ["a.jsonl", "bom.jsonl", "a.jsonl.gz", "a.json"])
def test_chunks_in_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A chunk is sent with its content, or of a plain local file with its place alone, and read there."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 200)
    lines = [json.dumps({"text": f"document {number} é"}) for number in range(60)]
    data = (f"[{','.join(lines)}]" if name == "a.json" else "".join(f"{line}\n" for line in lines)).encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else b"\xef\xbb\xbf" + data if "bom" in name else data)
    [source] = resolve([str(path)])
    found = list(read_chunks(source, 0))
    assert len(found) > 3
    assert [pickle.loads(pickle.dumps(each)).content for each in found] == [each.data for each in found]
    if name == "a.jsonl":
        planned = [dataclasses.replace(each, data=len(each.data), file=str(path)) for each in found]
        sent = [pickle.dumps(each) for each in planned]
        assert all(len(each) < 400 for each in sent)
        assert [pickle.loads(each).content for each in sent] == [each.data for each in found]
        path.write_bytes(data[:300])
        with pytest.raises(UserError, match="became shorter"):
            pickle.loads(sent[-1]).content  # noqa: B018 - reading it is the test
        path.unlink()
        with pytest.raises(UserError, match="cannot be read"):
            pickle.loads(sent[-1]).content  # noqa: B018
