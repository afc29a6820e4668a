"""Which tokens lie in the spans that are trained on."""

import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jllm.data.chat.token_spans import TokenLengths
from jllm.data.tokenizer.checked_engine import CheckedEngine, open_engine
from jllm.data.tokenizer.facts import TokenizerFacts, load_tokenizer
from tests.data.chats import assistant, chat_of, user
from tests.data.tokenizers_for_tests import sentencepiece_like


def test_spans_where_the_normalizer_keeps_the_length_of_the_whole(tmp_path: Path) -> None:
    """A letter that grows and letters that shrink under NFC: bytes add up, and tokens lie elsewhere all the same."""
    template = "{%- for message in messages %}{{- message.role + ': ' + message.content + ' ' }}{%- endfor %}"
    chat = chat_of(tmp_path, template)
    grows, shrinks = "\u0958 " * 2, "re\u0301sume\u0301 cafe\u0301 de\u0301ja\u0300 e\u0301"
    answer = chat.trained([user(f"{grows}here"), assistant(shrinks)])
    assert answer.strip() == "résumé café déjà é"


EXAMPLES = 60 * int(os.environ.get("JLLM_TEST_SIZE", "1"))


@pytest.fixture(scope="module")
def of_kind(
    facts: TokenizerFacts, engine: CheckedEngine, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[TokenizerFacts, CheckedEngine]]:
    found = {"bytes": (facts, engine)}
    for scheme in ("always", "never"):
        other = load_tokenizer(str(sentencepiece_like(tmp_path_factory.mktemp("tokenizer") / scheme, scheme)))
        found[scheme] = other, open_engine(other, inert=True)
    return found


@pytest.mark.parametrize("kind", ["bytes", "always", "never"])
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    texts=st.lists(st.text(st.sampled_from("ab é日 \ne\u0301▁"), min_size=1, max_size=12), min_size=1, max_size=4),
    cuts=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 12), st.integers(0, 12)), max_size=4),
)
def test_tokens_in_spans_are_those_by_offsets(
    kind: str, texts: list[str], cuts: list[tuple[int, int, int]], of_kind: dict[str, Any]
) -> None:
    """The table of lengths says what the offsets of `tokenizers` say, which give the whole letter for each of the
    tokens of a letter."""
    facts, engine = of_kind[kind]
    spans: list[tuple[int, int, int]] = []
    for number, one, other in cuts:
        text = texts[number % len(texts)]
        start, end = sorted((one % (len(text) + 1), other % (len(text) + 1)))
        if start < end:
            spans.append((number % len(texts), len(text[:start].encode()), len(text[:end].encode())))
    spans.sort()
    ids, offsets = engine.encode(texts)
    table = np.array(spans, dtype=np.int64).reshape(-1, 3)
    found = TokenLengths(facts).tokens_of_spans(engine, texts, ids, offsets, table)
    wanted = np.zeros(len(ids), dtype=bool)
    for number, begin, stop in spans:
        for first, behind in engine.tokens_of_bytes(texts[number], begin, stop):
            wanted[offsets[number] + first : offsets[number] + behind] = True
    for text, (begin, stop) in zip(texts, itertools.pairwise(offsets), strict=True):
        assert np.all(found[begin:stop] <= wanted[begin:stop])
        if text.isascii():
            assert np.array_equal(found[begin:stop], wanted[begin:stop])


def test_lengths_are_those_of_the_letters(facts: TokenizerFacts) -> None:
    assert facts.backend is not None
    vocabulary = tokenizers.Tokenizer.from_str(facts.backend).get_vocab(with_added_tokens=False)
    lengths = TokenLengths(facts).lengths
    assert {token: int(lengths[index]) for token, index in vocabulary.items()} == {
        token: len(token) for token in vocabulary
    }
