"""A fast path that fails its proof: the run starts over without it, and makes what it would have made."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from jllm.data.chat.short_cut import ShortCutError
from jllm.data.dataset.manifest import read_manifest
from jllm.data.prepare.config import Raw2IdsConfig
from jllm.data.prepare.restart import HF_ENGINE, NO_SHORT_CUT, Attempt, attempts
from jllm.data.prepare.run import prepare
from jllm.data.prepare.workplace import Workplace
from jllm.data.tokenizer.checked_engine import EngineMismatchError
from jllm.data.tokenizer.engines import FastEngine
from jllm.errors import UserError
from tests.data.chats import ODD
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


ENGINE, SHORT_CUT = EngineMismatchError("the engine differs"), ShortCutError("texts in its own way")


@pytest.mark.parametrize("choice", ["auto", "hf", "fastokens"])
@pytest.mark.parametrize(
    "errors", [list(some) for n in range(3) for some in itertools.permutations([ENGINE, SHORT_CUT], n)], ids=str
)
def test_each_failure_is_taken_out_once(
    choice: str, errors: list[Exception], capsys: pytest.CaptureFixture[str]
) -> None:
    left = list(errors)
    cleaned: list[Attempt] = []

    def run(attempt: Attempt) -> Attempt:
        if left:
            raise left.pop(0)
        return attempt

    if choice == "fastokens" and ENGINE in errors:
        with pytest.raises(UserError, match=r"^--engine fastokens: the engine differs; use --engine auto or hf$"):
            attempts(run, Attempt(choice=choice), cleaned.append)
        return
    last = attempts(run, Attempt(choice=choice), cleaned.append)
    assert last.engine == ("hf" if ENGINE in errors else choice) or choice == "hf"
    assert last.short_cut == (SHORT_CUT not in errors)
    assert last.reasons == {
        **({HF_ENGINE: str(ENGINE)} if ENGINE in errors else {}),
        **({NO_SHORT_CUT: str(SHORT_CUT)} if SHORT_CUT in errors else {}),
    }
    assert cleaned[-1:] == ([last] if errors else [])
    assert len(cleaned) == len(errors)
    ways = ["with the hf engine" if error is ENGINE else "without the short cut" for error in errors]
    wanted = "".join(f"{error}; starting over {way}\n" for error, way in zip(errors, ways, strict=True))
    assert capsys.readouterr().err == wanted


@pytest.mark.parametrize("order", ["engine first", "short cut first"])
def test_both_fast_paths_fail_one_after_the_other(
    tmp_path: Path,
    byte_tokenizer: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    order: str,
) -> None:
    """A run remembers the first failure when the second one makes it start over again."""
    rows = [[{"user": text[:90]}, {"assistant": text[-90:] + "."}] for text in documents(300)]
    odd = [{"user": "x" * 41 * 41}, {"assistant": "yes"}]
    source = tmp_path / "in"
    source.mkdir()
    files = [rows, [odd, *rows]] if order == "engine first" else [[odd, *rows], rows]
    for number, records in enumerate(files):
        (source / f"{number}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    values: dict[str, Any] = {"input": (str(source),), "tokenizer": str(byte_tokenizer), "chat_template": ODD}
    values |= {"cores": 1, "quiet": True}
    prepare(Raw2IdsConfig(**values, output=tmp_path / "wanted", engine="hf"))
    encode = FastEngine.encode

    def lie(self: FastEngine, texts: list[str], *, parse_special: bool = False) -> Any:
        ids, offsets = encode(self, texts, parse_special=parse_special)
        return (ids ^ 1 if len(texts) > 500 else ids), offsets

    monkeypatch.setattr(FastEngine, "encode", lie)
    notes: list[set[str]] = []
    note = Workplace.note

    def noted(self: Workplace, what: str, why: str) -> None:
        note(self, what, why)
        notes.append({path.name for path in self.work.glob("note *")})

    monkeypatch.setattr(Workplace, "note", noted)
    capsys.readouterr()
    manifest = prepare(Raw2IdsConfig(**values, output=tmp_path / "out"))
    said = capsys.readouterr().err
    assert said.count("starting over") == 2
    assert notes[-1] == {f"note {HF_ENGINE}", f"note {NO_SHORT_CUT}"}, "a killed run goes on from both"
    assert manifest.extra["engine"]["name"] == "hf"
    assert "differs" in manifest.extra["engine"]["reason"]
    assert rows_of(tmp_path / "out") == rows_of(tmp_path / "wanted")
