"""Texts that are encoded in pieces have the ids of the whole, and tokenizers for which that is not so are known."""

import itertools
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jllm.data.sources import json_values, long_texts
from jllm.data.sources.long_texts import LongText
from jllm.data.tokenizer import cutting
from jllm.data.tokenizer.checked_engine import CheckedEngine, open_engine
from jllm.data.tokenizer.cutting import can_be_cut, encode_long
from jllm.data.tokenizer.facts import PROBES, load_tokenizer
from tests.data.tokenizers_for_tests import asset_tokenizers

EXAMPLES = 100 * int(os.environ.get("JLLM_TEST_SIZE", "1"))
parts = st.sampled_from(
    [
        "a line\nb",
        "a line.\nZ",
        "======\nq",
        " \nx",
        "\r\n",
        "\n",
        "  ",
        "12345",
        "don't",
        "...",
        "naïve",
        "日本",
        "😀",
        "e\u0301",
        "/",
        "'S",
    ]
) | st.sampled_from(PROBES)
texts = st.lists(parts, min_size=1, max_size=40).map("".join)


@pytest.fixture(scope="module")
def engines(byte_tokenizer: Path) -> list[tuple[CheckedEngine, bool]]:
    """Engines, and whether theirs can be cut."""
    found = []
    for folder in [byte_tokenizer, *asset_tokenizers()]:
        facts = load_tokenizer(str(folder))
        assert facts.backend is not None
        found.append((open_engine(facts), can_be_cut(facts.backend)))
    return found


def test_byte_level_tokenizers_can_be_cut(byte_tokenizer: Path) -> None:
    for folder in [byte_tokenizer, *asset_tokenizers()]:
        backend = load_tokenizer(str(folder)).backend
        assert backend is not None
        assert can_be_cut(backend) == ("llama2" not in folder.name)


@settings(max_examples=EXAMPLES, deadline=None)
@given(text=texts, more=texts)
def test_pieces_have_the_ids_of_the_whole(engines: list[tuple[CheckedEngine, bool]], text: str, more: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"LONG": 20, "PIECE": 8, "_WINDOW": 64}.items():
            patch.setattr(long_texts, name, value)
        patch.setattr(cutting, "LONG", 20)
        [read] = json_values.parse([json.dumps({"text": text}).encode()], [1], long_field="text").values
        for engine, _ in engines:
            wanted = engine.engine.encode([text, "", more])
            for given_text in (text, read["text"]):
                given = engine.encode([given_text, "", more])
                assert np.array_equal(given[0], wanted[0])
                assert np.array_equal(given[1], wanted[1])


def test_an_engine_is_given_pieces(engines: list[tuple[CheckedEngine, bool]], monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, value in ((long_texts, "LONG", 200), (long_texts, "PIECE", 100), (cutting, "LONG", 200)):
        monkeypatch.setattr(module, name, value)
    text = "a line of a text\n" * 100
    [read] = json_values.parse([json.dumps(text).encode()], [1], long_field="text").values
    assert isinstance(read, LongText)
    for engine, is_cut in engines:
        longest: list[int] = []
        plain = engine.engine.encode

        def watched(
            texts: list[str],
            *,
            parse_special: bool = False,
            plain: Callable[..., Any] = plain,
            longest: list[int] = longest,
        ) -> Any:
            longest.append(max(map(len, texts)))
            return plain(texts, parse_special=parse_special)

        with monkeypatch.context() as patch:
            patch.setattr(engine.engine, "encode", watched)
            engine.encode([read])
            engine.encode([text])
        assert (max(longest) < 300) == is_cut
        assert engine.check([read]) == 1


def test_places_that_do_not_hold_are_put_together_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_texts, "PIECE", 4)
    asked: list[str] = []

    def encode(texts: list[str]) -> Any:
        """Each character is an id, but what follows a digit and a line end is none."""
        asked.extend(texts)
        rows = [[ord(c) for i, c in enumerate(text) if not re.search(r"[0-9]\n\Z", text[:i])] for text in texts]
        return np.array([*itertools.chain(*rows)], dtype=np.int32), np.cumsum([0, *map(len, rows)])

    text = "word1\nword.\nword2\nword\nx"
    for near in (1024, 2):
        monkeypatch.setattr(cutting, "NEAR", near)
        ids, offsets = encode_long([text], encode)
        assert ids.tolist() == encode([text])[0].tolist()
        assert offsets.tolist() == [0, len(ids)]


def _changed(backend: str, change: Callable[[dict[str, Any]], object]) -> str:
    value = json.loads(backend)
    change(value)
    return json.dumps(value)


def _with_pattern(pattern: str) -> Callable[[dict[str, Any]], object]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}

    def change(value: dict[str, Any]) -> None:
        value["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, value["pre_tokenizer"]]}

    return change


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a token over a place": lambda value: value["model"]["vocab"].update({"eĊdef": 9999}),
    "a normaliser of another kind": lambda value: value.update(normalizer={"type": "Strip"}),
    "a blank in front": lambda value: value["pre_tokenizer"].update(add_prefix_space=True),
    "no pre-tokenizer": lambda value: value.update(pre_tokenizer=None),
    "dropout": lambda value: value["model"].update(dropout=0.1),
    "fused unknown tokens": lambda value: value["model"].update(fuse_unk=True),
    "marks of words": lambda value: value["model"].update(end_of_word_suffix="</w>"),
    "an added token that takes blanks": lambda value: value["added_tokens"][0].update(lstrip=True),
    "an added token over a place": lambda value: value["added_tokens"][0].update(content="<\na>"),
    **{each: _with_pattern(each) for each in (r"(?<=a)b", r"(?<!a)b", r"\bx", r"^a|b", r"a$", r"a\Z")},
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_tokenizers_are_not_cut(byte_tokenizer: Path, name: str) -> None:
    backend = load_tokenizer(str(byte_tokenizer)).backend
    assert backend is not None
    assert can_be_cut(backend)
    assert not can_be_cut(_changed(backend, CHANGES[name]))
