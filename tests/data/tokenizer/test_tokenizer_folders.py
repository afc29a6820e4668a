"""Folders without a tokenizer.json: they work, or one line says what to do."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from jllm.data.dataset.manifest import read_manifest
from tests.data.raw2ids_runs import documents, raw2ids, rows_of, tree, write_jsonl
from tests.data.tokenizers_for_tests import (
    TIKTOKEN_PATTERN,
    make_sentencepiece_folder,
    make_slow_folder,
    make_tiktoken_folder,
)

TEMPLATE = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
TEXTS = [*documents(20), "The quick brown fox, the world's 1234567 calls", "naïve\n\n  日本語 \x07 👍🏽"]


def made(tmp_path: Path, tokenizer: Path) -> tuple[list[list[int]], str]:
    """The documents of `TEXTS`, and the engine that encoded them."""
    source = write_jsonl(tmp_path / "some.jsonl", TEXTS)
    raw2ids("-i", source, "-o", tmp_path / "out", "--tokenizer", tokenizer, "-t", "pretrain")
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    return rows_of(tmp_path / "out"), manifest.extra["engine"]["version"]


def test_a_sentencepiece_model_alone(tmp_path: Path) -> None:
    folder = make_sentencepiece_folder(tmp_path / "tokenizer")
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    rows, _ = made(tmp_path, folder)
    assert len(rows) == len(TEXTS)
    for row, text in zip(rows, TEXTS, strict=True):
        if not text.startswith(" "):  # there AutoTokenizer, which is the truth, puts one mark less in front
            assert row == [model.bos_id(), *model.encode(text), model.eos_id()]


def test_a_tiktoken_vocabulary_alone(tmp_path: Path) -> None:
    ranks = make_tiktoken_folder(tmp_path / "tokenizer")
    import tiktoken

    encoding = tiktoken.Encoding("test", pat_str=TIKTOKEN_PATTERN, mergeable_ranks=ranks, special_tokens={})
    rows, _ = made(tmp_path, tmp_path / "tokenizer")
    assert [row[:-1] for row in rows] == [encoding.encode(text) for text in TEXTS]
    assert {row[-1] for row in rows} == {len(ranks)}


@pytest.mark.parametrize("make", [make_sentencepiece_folder, make_tiktoken_folder])
def test_conversations_work_without_tokenizer_json(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "tokenizer")
    source = tmp_path / "chat.jsonl"
    source.write_text(json.dumps([{"user": "the quick"}, {"assistant": "the world"}]) + "\n")
    result = raw2ids(
        "-i", source, "-o", tmp_path / "out", "--tokenizer", tmp_path / "tokenizer", "--chat_template", TEMPLATE,
        "--debug", 1,
    )  # fmt: skip
    assert "[[ the world" in result.stdout or "[[the world" in result.stdout


def test_a_tokenizer_of_python_code_alone(tmp_path: Path) -> None:
    folder = make_slow_folder(tmp_path / "tokenizer")
    rows, engine = made(tmp_path, folder)
    assert rows == [[*(byte + 3 for byte in text.encode()), 1] for text in TEXTS]
    assert "slow" in engine
    source = tmp_path / "chat.jsonl"
    source.write_text(json.dumps([{"user": "a"}, {"assistant": "b"}]) + "\n")
    words = ["-i", source, "-o", tmp_path / "chat", "--tokenizer", folder, "--chat_template", TEMPLATE]
    refused = raw2ids(*words, check=False)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "tokenizer.json" in refused.stderr
    before = tree(tmp_path / "out")
    refused = raw2ids(*words, "-C", "-o", tmp_path / "out", check=False)
    assert refused.returncode == 2
    assert tree(tmp_path / "out") == before  # found out before anything was removed


def test_notices_of_transformers_stay_out_of_our_lines(tmp_path: Path) -> None:
    """This tokenizer runs in the command's own process, and has something to say of texts that are long to it."""
    folder = make_slow_folder(tmp_path / "tokenizer")
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_max_length": 5, "odd_setting": 1}))
    source = write_jsonl(tmp_path / "some.jsonl", TEXTS)
    words = ["-i", source, "-o", tmp_path / "out", "--tokenizer", folder, "-t", "pretrain"]
    result = raw2ids(*words, own_process=True)
    assert result.stderr.splitlines() == ["engine: hf, not fastokens: the tokenizer has no fast backend"]
