"""New tokens get the ids after the largest one in use, are encoded as one id, and change nothing else."""

import contextlib
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jllm.data.tokenizer.extending import new_tokens
from jllm.data.tokenizer.facts import auto_tokenizer, load_tokenizer
from jllm.errors import UserError
from tests.data.tokenizers_for_tests import asset_tokenizers, make_byte_tokenizer, make_sentencepiece_folder

REAL = asset_tokenizers()[: None if int(os.environ.get("JLLM_TEST_SIZE", "1")) > 1 else 1]
TEXT = "The quick brown fox, naïve: def f(x) 日本語 <|im_start|>user\nhi<|im_end|>"
TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12)


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_byte_tokenizer(tmp_path_factory.mktemp("byte"))


@settings(max_examples=15, deadline=None)
@given(tokens=st.lists(TEXTS, min_size=1, max_size=5))
def test_any_tokens(byte_tokenizer: Path, tokens: list[str]) -> None:
    """Each has one id, the ids are contiguous, and nothing that was given is lost."""
    wanted = [token for token in tokens if token.strip()] or ["<x>"]
    found = None
    with contextlib.suppress(UserError):  # one within another, which no text can have alone
        found = new_tokens(byte_tokenizer, plain=wanted, special=[])
    if found is None:
        assert any(one != other and one in other for one in wanted for other in wanted)
        return
    assert set(wanted) == found.ids.keys() | found.known.keys()
    assert list(found.ids.values()) == list(range(found.first, found.first + len(found.ids)))


def check(folder: Path, target: Path) -> None:
    before = auto_tokenizer(str(folder), trust_remote_code=False)
    found = new_tokens(folder, plain=["<plan>", "</plan>", "ünïcode token"], special=["<|control|>"])
    assert found.first == max(before.get_vocab().values()) + 1
    target.mkdir()
    found.save(target)
    after = auto_tokenizer(str(target), trust_remote_code=False)
    for token, number in found.ids.items():
        assert after.encode(token, add_special_tokens=False) == [number]
        assert after.encode(f"x{token}y", add_special_tokens=False).count(number) == 1
    assert after.encode(TEXT) == before.encode(TEXT)
    ids = after.encode("a<plan>b<|control|>c", add_special_tokens=False)
    assert "<plan>" in after.decode(ids, skip_special_tokens=True)
    assert "<|control|>" not in after.decode(ids, skip_special_tokens=True)
    facts = load_tokenizer(str(target))
    assert facts.vocab_size == max(after.get_vocab().values()) + 1 == found.first + 4


def test_a_byte_level_tokenizer(byte_tokenizer: Path, tmp_path: Path) -> None:
    check(byte_tokenizer, tmp_path / "new")


def test_a_sentencepiece_tokenizer(tmp_path: Path) -> None:
    check(make_sentencepiece_folder(tmp_path / "old"), tmp_path / "new")


@pytest.mark.parametrize("folder", REAL or [pytest.param(None, marks=pytest.mark.skip("no JLLM_ASSETS"))])
def test_real_tokenizers(folder: Path, tmp_path: Path) -> None:
    check(folder, tmp_path / "new")


def test_what_is_there_is_told(byte_tokenizer: Path) -> None:
    found = new_tokens(byte_tokenizer, plain=["<think>", "<new>", "<new>"], special=["<|im_end|>"])
    assert list(found.ids) == ["<new>"]
    assert found.known.keys() == {"<think>", "<|im_end|>"}


@pytest.mark.parametrize(
    ("plain", "special", "message"),
    [
        ([" "], [], "--add ' ': nothing but white space"),
        ([""], [], "--add '': nothing but white space"),
        (["<a>"], ["<a>"], "'<a>' is given as a plain and as a special token"),
    ],
)
def test_mistakes(byte_tokenizer: Path, plain: list[str], special: list[str], message: str) -> None:
    with pytest.raises(UserError) as refused:
        new_tokens(byte_tokenizer, plain=plain, special=special)
    assert str(refused.value).startswith(message)


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no tokenizer that transformers loads"):
        new_tokens(tmp_path, plain=["<a>"], special=[])
