"""A fast path that fails its proof: the run starts over without it, and makes what it would have made."""

import json
from pathlib import Path
from typing import Any

import pytest

from jllm.data.dataset.manifest import read_manifest
from jllm.data.prepare.config import Raw2IdsConfig
from jllm.data.prepare.run import prepare
from jllm.data.tokenizer.engines import FastEngine
from jllm.errors import UserError
from tests.data.raw2ids_runs import documents, reference_stream, rows_of, stacked, write_jsonl


def test_a_difference_found_on_the_way_starts_over(
    tmp_path: Path, byte_tokenizer: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encode = FastEngine.encode

    def lie(self: FastEngine, texts: list[str], *, parse_special: bool = False) -> Any:
        ids, offsets = encode(self, texts, parse_special=parse_special)
        return (ids ^ 1 if any("alpha" in text for text in texts) else ids), offsets

    monkeypatch.setattr(FastEngine, "encode", lie)
    texts = documents(100)
    source = write_jsonl(tmp_path / "some.jsonl", texts)
    values: dict[str, Any] = {"input": (str(source),), "tokenizer": str(byte_tokenizer), "type": "pretrain"}
    values |= {"stack": True, "max_len": 65}
    prepare(Raw2IdsConfig(**values, output=tmp_path / "out"))
    assert "starting over with the hf engine" in capsys.readouterr().err
    assert rows_of(tmp_path / "out") == stacked(reference_stream(byte_tokenizer, texts), 65)[0]
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert manifest.extra["engine"]["name"] == "hf"
    assert "differs" in manifest.extra["engine"]["reason"]
    with pytest.raises(UserError, match="--engine auto or hf"):
        prepare(Raw2IdsConfig(**values, output=tmp_path / "forced", engine="fastokens"))


def test_a_difference_found_in_a_conversation_starts_over(
    tmp_path: Path, byte_tokenizer: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [[{"user": text[:90]}, {"assistant": text[-90:]}] for text in documents(400)]
    source = tmp_path / "chat.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values: dict[str, Any] = {"input": (str(source),), "tokenizer": str(byte_tokenizer), "chat_template": "chatml"}
    prepare(Raw2IdsConfig(**values, output=tmp_path / "wanted", engine="hf"))
    encode = FastEngine.encode

    def lie(self: FastEngine, texts: list[str], *, parse_special: bool = False) -> Any:
        ids, offsets = encode(self, texts, parse_special=parse_special)
        return (ids ^ 1 if len(texts) > 500 else ids), offsets  # right in its proof, wrong in a block

    monkeypatch.setattr(FastEngine, "encode", lie)
    prepare(Raw2IdsConfig(**values, output=tmp_path / "out"))
    assert "starting over with the hf engine" in capsys.readouterr().err
    assert rows_of(tmp_path / "out") == rows_of(tmp_path / "wanted")
    with pytest.raises(UserError, match="--engine auto or hf"):
        prepare(Raw2IdsConfig(**values, output=tmp_path / "forced", engine="fastokens"))
    assert not list((tmp_path / "forced").glob("*.parquet"))
