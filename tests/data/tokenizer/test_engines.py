"""Engines: both give the ids of `tokenizers`, flat, and added tokens are text or ids as asked for."""

import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jllm.data.tokenizer.engines import FastEngine, ReferenceEngine, SlowEngine, TokenizerEngine, use_cores
from jllm.data.tokenizer.facts import TokenizerFacts, load_tokenizer
from tests.data.tokenizers_for_tests import ADDED, SPECIAL, make_slow_folder

EXAMPLES = 40 * int(os.environ.get("JLLM_TEST_SIZE", "1"))
texts = st.lists(
    st.one_of(st.characters(codec="utf-8"), st.sampled_from([*SPECIAL, *ADDED, " the", "\n"])), max_size=12
).map("".join)


@pytest.fixture(scope="module")
def facts(byte_tokenizer: Path) -> TokenizerFacts:
    return load_tokenizer(str(byte_tokenizer))


@pytest.fixture(scope="module")
def engines(facts: TokenizerFacts) -> dict[bool, list[TokenizerEngine]]:
    """Both engines, as they are opened for documents (False) and for chat (True)."""
    assert facts.backend is not None
    return {
        inert: [kind(facts.backend, inert=inert) for kind in (ReferenceEngine, FastEngine)] for inert in (False, True)
    }


def rows(engine: TokenizerEngine, given: list[str], *, parse_special: bool = False) -> list[list[int]]:
    ids, offsets = engine.encode(given, parse_special=parse_special)
    assert ids.dtype == np.int32
    assert offsets.dtype == np.int64
    assert offsets[0] == 0
    assert offsets[-1] == len(ids)
    return [ids[a:b].tolist() for a, b in itertools.pairwise(offsets)]


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(given_=st.lists(texts, max_size=5), parse_special=st.booleans())
def test_ids_are_those_of_tokenizers(
    given_: list[str], parse_special: bool, facts: TokenizerFacts, engines: dict[bool, list[TokenizerEngine]]
) -> None:
    assert facts.backend is not None
    plain = tokenizers.Tokenizer.from_str(facts.backend)
    plain.encode_special_tokens = not parse_special
    wanted = [plain.encode(text, add_special_tokens=False).ids for text in given_]
    for engine in engines[False]:
        assert rows(engine, given_, parse_special=parse_special) == wanted
    value = json.loads(facts.backend)
    value["added_tokens"] = []  # to whom all added tokens are text has none
    wanted = [tokenizers.Tokenizer.from_str(json.dumps(value)).encode(text).ids for text in given_]
    for engine in engines[True]:
        assert rows(engine, given_) == wanted


def test_the_reference_tells_whole_texts_and_places(byte_tokenizer: Path, facts: TokenizerFacts) -> None:
    assert facts.backend is not None
    reference = ReferenceEngine(facts.backend, inert=True)
    plain = tokenizers.Tokenizer.from_file(str(byte_tokenizer / "tokenizer.json"))
    text = "<|im_start|>user\nnaïve 日本<|im_end|>"
    assert reference.whole(text).tolist() == plain.encode(text, add_special_tokens=False).ids
    spans = reference.token_spans("naïve 日本")
    assert spans[0][0] == 0
    assert spans[-1][1] == len("naïve 日本")
    # What checks have loaded tells them where no added token is met; another engine has nothing loaded.
    other = ReferenceEngine(facts.backend, inert=True)
    assert (reference.token_spans(text), spans) == (other.token_spans(text), other.token_spans("naïve 日本"))
    assert len(spans) < len(reference.token_spans(text))
    before = rows(reference, [text])
    reference.forget()
    assert rows(reference, [text]) == before


def test_a_tokenizer_of_python_code(tmp_path: Path) -> None:
    slow = SlowEngine(load_tokenizer(str(make_slow_folder(tmp_path / "slow"))))
    assert rows(slow, ["ab", "", "é"]) == [[100, 101], [], [byte + 3 for byte in "é".encode()]]


def test_cores_of_both_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("RAYON_NUM_THREADS", "7")
    use_cores(3)
    assert os.environ["RAYON_NUM_THREADS"] == "3"
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false", "what a user set stays"


def test_what_checks_have_loaded_tells_places_too(facts: TokenizerFacts) -> None:
    """A worker makes no instance of its own for it."""
    assert facts.backend is not None
    reference = ReferenceEngine(facts.backend, inert=True)
    reference.load()
    plain = reference.token_spans("naïve 日本")
    assert list(reference._backends) == [(False, True)]
    assert reference.token_spans("naïve 日本", marks_first=True) == plain
    assert len(reference._backends) == 2
