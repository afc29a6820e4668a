"""Ids back to text, by the tokenizer that made them and no other."""

from pathlib import Path

import pytest

from jllm.data.dataset.manifest import Tokenizer
from jllm.data.tokenizer.decoding import make_decoder
from jllm.data.tokenizer.facts import load_tokenizer
from jllm.errors import UserError


def test_decodes(byte_tokenizer: Path) -> None:
    facts = load_tokenizer(str(byte_tokenizer))
    decode = make_decoder(str(byte_tokenizer), facts.for_manifest)
    import tokenizers

    assert facts.backend is not None
    text = "naïve 日本語\n"
    ids = tokenizers.Tokenizer.from_str(facts.backend).encode(text, add_special_tokens=False).ids
    assert decode(ids) == text
    assert make_decoder(str(byte_tokenizer), None)(ids) == text


def test_another_tokenizer_is_refused(byte_tokenizer: Path) -> None:
    other = Tokenizer(name="other", vocab_size=1, sha256="0")
    with pytest.raises(UserError, match="made with another tokenizer \\(other\\)"):
        make_decoder(str(byte_tokenizer), other)
