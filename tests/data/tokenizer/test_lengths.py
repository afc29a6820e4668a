"""Texts whose tokens are their bytes: the test of them agrees with what tokenizers make of the texts."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jllm.data.tokenizer.facts import load_tokenizer
from jllm.data.tokenizer.lengths import unchanged

EXAMPLES = 60 * int(os.environ.get("JLLM_TEST_SIZE", "1"))


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("e\u0301a\u0308\u0958ﬁ")), max_size=10))
def test_tokens_of_unchanged_texts_are_their_bytes(text: str, byte_tokenizer: Path) -> None:
    backend = load_tokenizer(str(byte_tokenizer)).backend
    assert backend is not None
    is_unchanged = unchanged(json.loads(backend))
    assert is_unchanged is not None
    plain = tokenizers.Tokenizer.from_str(backend)
    plain.encode_special_tokens = True
    tokens = plain.encode(text, add_special_tokens=False).tokens
    assert text.isascii() <= is_unchanged(text)
    if is_unchanged(text):  # a byte is a letter in byte-level tokens
        assert sum(map(len, tokens)) == len(text.encode())
    else:
        assert plain.normalizer.normalize_str(text) != text


@pytest.mark.parametrize(
    ("change", "known"),
    [
        ({}, True),
        ({"model": {"type": "WordPiece"}}, False),
        ({"model": {"type": "BPE", "end_of_word_suffix": "</w>"}}, False),
        ({"normalizer": {"type": "Lowercase"}}, False),
        ({"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}}, True),
        ({"normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "b"}}, False),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Strip"}]}}, False),
        ({"pre_tokenizer": {"type": "Split", "behavior": "Removed"}}, False),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits"}, {"type": "ByteLevel"}]}}, True),
        ({"pre_tokenizer": {"type": "BertPreTokenizer"}}, False),
    ],
)
def test_what_is_not_known_is_not_relied_on(change: dict[str, Any], known: bool) -> None:
    backend = {"model": {"type": "BPE"}, "normalizer": None, "pre_tokenizer": None, **change}
    assert (unchanged(backend) is not None) == known
