"""Chunks to documents: each good record one document, bad ones by their lines, in order."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jllm.data.prepare.encoding import PretrainEncoder, pretrain_affixes
from jllm.data.sources import long_texts
from jllm.data.sources.chunk import Chunk
from jllm.data.tokenizer.checked_engine import CheckedEngine, open_engine
from jllm.data.tokenizer.facts import TokenizerFacts, load_tokenizer
from jllm.errors import UserError
from tests.data.chats import PLAIN, Chat, assistant, user
from tests.data.tokenizers_for_tests import make_byte_tokenizer

EXAMPLES = 40 * int(os.environ.get("JLLM_TEST_SIZE", "1"))
records = st.one_of(
    st.text(st.characters(codec="utf-8"), max_size=12).map(lambda text: {"text": text}),
    st.just({"text": "x<|endoftext|>y"}),
    st.just({"other": 1}),
    st.just({"text": 3}),
)


@pytest.fixture(scope="module")
def facts(byte_tokenizer: Path) -> TokenizerFacts:
    return load_tokenizer(str(byte_tokenizer))


@pytest.fixture(scope="module")
def engine(facts: TokenizerFacts) -> CheckedEngine:
    return open_engine(facts)


def chunk_of(values: list[Any], index: int = 0) -> Chunk:
    data = "".join(json.dumps(value) + "\n" for value in values).encode()
    return Chunk(source=0, index=index, line=5, data=data, end=99, end_line=5 + len(values))


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(values=st.lists(records, max_size=8), parse=st.booleans(), masked=st.booleans(), index=st.integers(0, 9))
def test_documents_and_bad_records(
    values: list[Any], parse: bool, masked: bool, index: int, facts: TokenizerFacts, engine: CheckedEngine
) -> None:
    encoder = PretrainEncoder(
        engine=engine, prefix=(7,), suffix=(8, 9), parse_special=parse,
        masked_ids=facts.special_ids if masked else frozenset(),
    )  # fmt: skip
    encoded = encoder(chunk_of(values, index), "jsonl")
    texts = {number: value["text"] for number, value in enumerate(values, 5) if isinstance(value.get("text"), str)}
    good = {number: text for number, text in texts.items() if text.strip()}
    documents = encoded.documents
    assert len(documents) == len(good)
    for text, begin, end in zip(good.values(), documents.offsets[:-1], documents.offsets[1:], strict=True):
        wanted = engine.encode([text], parse_special=parse)[0].tolist()
        assert documents.ids[begin:end].tolist() == [7, *wanted, 8, 9]
    if masked:
        assert documents.labels is not None
        special = np.isin(documents.ids, list(facts.special_ids))
        assert np.array_equal(documents.labels, np.where(special, -100, documents.ids))
    assert (documents.labels is None) == (not masked)
    assert [record.line for record in encoded.bad] == [n for n in range(5, 5 + len(values)) if n not in good]
    assert encoded.counts["records"] == len(values)
    turn = index < 4 or index % 4 == 0
    assert (encoded.counts["checks"] > 0) == (bool(good) and turn and engine.name == "fastokens")
    assert (encoded.end, encoded.end_line) == (99, 5 + len(values))


@pytest.mark.parametrize("broken", [b"\\x", b"\xff", b"\\ud800", b"\x01", b'"'])
def test_a_long_text_that_is_broken_costs_itself(
    facts: TokenizerFacts, engine: CheckedEngine, monkeypatch: pytest.MonkeyPatch, broken: bytes
) -> None:
    """It is found out where the text is read, and told as of a short one."""
    encoder = PretrainEncoder(engine=engine, prefix=(), suffix=(9,))
    texts = ["short", "a line of a long text\n" * 40, "a line of another one\n" * 50]
    chunk = chunk_of([{"text": text} for text in texts])
    at = chunk.data.rindex(b"another one")
    chunk = dataclasses.replace(chunk, data=chunk.data[:at] + broken + chunk.data[at:])
    wanted = encoder(chunk, "jsonl")
    monkeypatch.setattr(long_texts, "LONG", 200)
    monkeypatch.setattr(long_texts, "PIECE", 100)
    found = encoder(chunk, "jsonl")
    assert len(found.documents) == 2
    assert found.documents.ids.tolist() == wanted.documents.ids.tolist()
    assert found.bad == wanted.bad
    assert found.bad


def test_what_goes_around_documents(tmp_path: Path, facts: TokenizerFacts) -> None:
    end = next(token["id"] for token in facts.added if token["content"] == "<|endoftext|>")
    assert pretrain_affixes(facts) == ((), (end,))
    without = load_tokenizer(str(make_byte_tokenizer(tmp_path / "without", eos_token=None)))
    with pytest.raises(UserError, match=r"no end-of-text token .* give --doc_suffix"):
        pretrain_affixes(without)


def test_long_conversations_are_dropped_or_refused(facts: TokenizerFacts) -> None:
    encoder = Chat(facts, open_engine(facts, inert=True), PLAIN).encoder
    chunk = chunk_of([{"messages": [user("q"), assistant("word " * size)]} for size in (1, 90, 2)])
    dropping = dataclasses.replace(encoder, longest=60)(chunk, "jsonl")
    assert (len(dropping.documents), dropping.counts["overlong"]) == (2, 1)
    assert not dropping.bad
    with pytest.raises(UserError, match=r"^--overlong error: the conversation at line 6 has \d+ tokens"):
        dataclasses.replace(encoder, longest=60, refuse_longer=True)(chunk, "jsonl")
