"""Long strings of JSON records are what the parser reads, whatever is in them and around them."""

import itertools
import json
import os
import re
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jllm.data.sources import json_values, long_texts
from jllm.data.sources.long_texts import BrokenTextError, LongText

EXAMPLES = 300 * int(os.environ.get("JLLM_TEST_SIZE", "1"))
parts = st.sampled_from(
    [
        "a line\nb",
        "another.\nZ",
        " \nq",
        "\\",
        '"',
        '\\"',
        "\\n",
        "\n",
        "\u0007",
        "é",
        "😀",
        "long text 0.0",
        "x",
        "{",
        "]",
    ]
)
texts = st.lists(parts, max_size=30).map("".join)
records = st.dictionaries(
    st.sampled_from(["text", "other", "z"]) | texts, texts | st.lists(texts) | st.integers(-(2**63), 2**63)
)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_texts, "LONG", 20)
    monkeypatch.setattr(long_texts, "PIECE", 8)
    monkeypatch.setattr(long_texts, "_WINDOW", 16)


def _materialised(value: Any) -> Any:
    if isinstance(value, LongText):
        pieces = list(value)
        assert "".join(pieces) == value.whole
        assert value.sample in pieces
        assert len(pieces) > 1
        for before, after in itertools.pairwise(pieces):
            assert re.search(r"[!-~]\n\Z", before)
            assert re.match("[A-Za-z]", after)
        return value.whole
    if isinstance(value, dict):
        return {key: _materialised(item) for key, item in value.items()}
    return [_materialised(item) for item in value] if isinstance(value, list) else value


@settings(max_examples=EXAMPLES, deadline=None)
@given(record=records, ascii=st.booleans(), indent=st.sampled_from([None, 1]))
@example(record={"text": "a line\nb" * 20, "other": 'x\\\\"' * 9}, ascii=True, indent=None)
@example(record={"text": "long text 0.0", "other": "a line\nb" * 20}, ascii=False, indent=None)
@example(record={"a line\nb" * 20: "a line\nb" * 20}, ascii=False, indent=None)
def test_a_record_is_what_the_parser_reads(record: Any, ascii: bool, indent: int | None) -> None:
    row = json.dumps(record, ensure_ascii=ascii, indent=indent).encode()
    found = json_values.parse([row], [1], long_field="text")
    assert _materialised(found.values[0]) == record


def test_long_texts_are_kept() -> None:
    text = "line of a text\n" * 9
    [value] = json_values.parse([json.dumps({"text": text, "n": 1}).encode()], [1], long_field="text").values
    assert isinstance(value["text"], LongText)
    assert _materialised(value) == {"text": text, "n": 1}
    [value] = json_values.parse([json.dumps({"text": text}).encode()], [1]).values
    assert value == {"text": text}


@pytest.mark.parametrize("depth", [1, 400, 900])
@pytest.mark.parametrize("holder", ["[%s]", '{"in": %s}', '[{"in": %s}]'])
def test_a_record_of_any_depth_is_read(holder: str, depth: int) -> None:
    """A parser reads values deeper than Python's calls may be, and so does whatever looks for texts in them."""
    nested, text = "0", "line of a text\n" * 9
    for _ in range(depth // holder.count("%s") // (1 + holder.startswith("[{"))):
        nested = holder % nested
    row = f'{{"before": {nested}, "text": {json.dumps(text)}, "behind": {nested}}}'.encode()
    plain, kept = json_values.parse([row], [1]), json_values.parse([row], [1], long_field="text")
    assert len(kept.values) == 1
    [value] = kept.values
    assert isinstance(value["text"], LongText)
    assert json.dumps(value["before"]) == json.dumps(plain.values[0]["behind"]) == json.dumps(value["behind"])


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    record=records,
    place=st.integers(0, 10**6),
    junk=st.sampled_from([b"", b'"', b"\\", b"\xff", b"\n", b"\\ud800", b","]),
    field=st.sampled_from(["text", "nowhere"]),
)
def test_what_is_broken_is_told_as_of_short_texts(record: Any, place: int, junk: bytes, field: str) -> None:
    row = json.dumps({"text": "a line\nb" * 12, **record}).encode()
    place %= len(row)
    row = row[:place] + junk + row[place + 1 :]
    plain, kept = json_values.parse([row], [1]), json_values.parse([row], [1], long_field=field)
    try:
        read = [_materialised(value) for value in kept.values]
    except BrokenTextError:
        assert field == "text", "all others are read here"
        assert not plain.values
        return
    assert read == plain.values
    assert kept.bad == plain.bad


@given(text=texts)
def test_pieces_of_a_text_are_the_text(text: str) -> None:
    pieces = list(long_texts.pieces_of(text))
    assert "".join(pieces) == text
    assert len(pieces) == 1 or all(pieces)
