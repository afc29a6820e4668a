"""Serialised backends, rewritten: they encode as before."""

import json
from pathlib import Path

import numpy as np
import pytest

from jllm.data.tokenizer.backend import encoding_of, with_short_merges
from jllm.data.tokenizer.checked_engine import open_engine
from jllm.data.tokenizer.facts import PROBES, load_tokenizer
from tests.data.tokenizers_for_tests import sentencepiece_like

ADVERSARIAL = [*PROBES[1:], *(f"{a}{b}{a}" for a in PROBES[3:12] for b in ("<|im_end|>", "</s>", " ", "\n"))]


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_metaspace_is_rewritten_exactly(tmp_path: Path, scheme: str) -> None:
    folder = sentencepiece_like(tmp_path / "tokenizer", scheme)
    facts = load_tokenizer(str(folder))
    chosen = open_engine(facts)
    assert len(facts.prefix) == 1
    reference = open_engine(facts, "hf")
    for parse_special in (False, True):
        wanted = reference.encode(ADVERSARIAL, parse_special=parse_special)
        given = chosen.encode(ADVERSARIAL, parse_special=parse_special)
        assert all(np.array_equal(a, b) for a, b in zip(given, wanted, strict=True))
    assert chosen.name == "fastokens"


def test_spellings_of_one_backend_mean_the_same(byte_tokenizer: Path) -> None:
    facts = load_tokenizer(str(byte_tokenizer))
    assert facts.backend is not None
    file = json.loads((byte_tokenizer / "tokenizer.json").read_text())
    file["model"]["merges"] = [" ".join(merge) for merge in file["model"]["merges"]]
    file["decoder"] = None
    assert encoding_of(json.dumps(file)) == encoding_of(facts.backend)
    file["normalizer"] = None
    assert encoding_of(json.dumps(file)) != encoding_of(facts.backend)


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("odd", [",", '","', "],[", '"', "\\", "merges", '"merges":[[', "é"])
def test_short_merges_are_the_same_merges(byte_tokenizer: Path, odd: str, indent: int | None) -> None:
    facts = load_tokenizer(str(byte_tokenizer))
    assert facts.backend is not None
    value = json.loads(facts.backend)
    value["model"]["vocab"][odd] = len(value["model"]["vocab"])
    value["model"]["merges"] += [[odd, odd], [odd, "a"], ["a", odd]]
    short = json.loads(with_short_merges(json.dumps(value, indent=indent, ensure_ascii=indent is None)))
    assert all(isinstance(merge, str) for merge in short["model"]["merges"])
    short["model"]["merges"] = [merge.split(" ") for merge in short["model"]["merges"]]
    assert short == value


def test_merges_that_cannot_be_short_stay(byte_tokenizer: Path) -> None:
    facts = load_tokenizer(str(byte_tokenizer))
    assert facts.backend is not None
    value = json.loads(facts.backend)
    for last in (["a b", "c"], ["", "a b"], ["a"], "a b"):
        text = json.dumps({**value, "model": {**value["model"], "merges": [["a", "b"], last]}})
        assert with_short_merges(text) == text
    behind = json.dumps({"model": value["model"], "behind": [1]})
    assert with_short_merges(behind) == behind
    assert with_short_merges(json.dumps(value["added_tokens"])) == json.dumps(value["added_tokens"])
