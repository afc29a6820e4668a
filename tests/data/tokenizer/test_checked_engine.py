"""The fast engine is used only where it is equal, and goes on proving it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jllm.data.tokenizer import checked_engine as engines
from jllm.data.tokenizer.checked_engine import CheckedEngine, EngineMismatchError, open_engine, sample_of
from jllm.data.tokenizer.engines import FastEngine, ReferenceEngine
from jllm.data.tokenizer.facts import PROBES, load_tokenizer
from jllm.errors import UserError
from tests.data.tokenizers_for_tests import asset_tokenizers, save

ADVERSARIAL = [*PROBES[1:], *(f"{a}{b}{a}" for a in PROBES[3:12] for b in ("<|im_end|>", "</s>", " ", "\n"))]


def test_what_the_fast_engine_refuses_runs_on_hf(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, normalizers

    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), ("a", -1.0), ("b", -2.0)], unk_id=0))
    tokenizer.normalizer = normalizers.NFKC()
    folder = save(tokenizer, tmp_path / "unigram", unk_token="<unk>")
    facts = load_tokenizer(str(folder))
    assert open_engine(facts).name == "hf"
    with pytest.raises(UserError, match="fastokens"):
        open_engine(facts, "fastokens")


def test_real_tokenizers_are_equal() -> None:
    folders = asset_tokenizers()
    if not folders:
        pytest.skip("no real tokenizers: set JLLM_ASSETS")
    for folder in folders:
        facts = load_tokenizer(str(folder))
        chosen, reference = open_engine(facts), open_engine(facts, "hf")
        assert chosen.name == "fastokens"
        given, wanted = chosen.encode(ADVERSARIAL), reference.encode(ADVERSARIAL)
        assert all(np.array_equal(a, b) for a, b in zip(given, wanted, strict=True))


def test_checks_compare_with_the_reference(byte_tokenizer: Path) -> None:
    facts = load_tokenizer(str(byte_tokenizer))
    assert facts.backend is not None
    good = open_engine(facts)
    assert good.check(["some text", "more"]) == 2
    assert good.check([]) == 0
    reference = ReferenceEngine(facts.backend)

    class Wrong(FastEngine):
        def encode(self, texts: list[str], *, parse_special: bool = False) -> Any:
            ids, offsets = super().encode(texts, parse_special=parse_special)
            return ids + 1, offsets

    wrong = CheckedEngine(Wrong(facts.backend), reference, reason="", probes=0)
    with pytest.raises(EngineMismatchError):
        wrong.check(["some text"])
    assert sum(map(len, sample_of(["x" * 100_000]))) == engines.CHECK_CHARACTERS
