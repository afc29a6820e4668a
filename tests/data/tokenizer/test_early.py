"""Engines built early are used where they encode as AutoTokenizer's backend does, and nowhere else."""

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jllm.data.tokenizer import early as early_
from jllm.data.tokenizer.early import EarlyEngines
from jllm.data.tokenizer.engines import FastEngine, ReferenceEngine
from jllm.data.tokenizer.facts import load_tokenizer


def test_engines_of_the_file_or_of_what_is_known(byte_tokenizer: Path) -> None:
    facts = load_tokenizer(str(byte_tokenizer))
    assert facts.backend is not None
    wanted = ReferenceEngine(facts.backend).encode(["some text"])
    for known in (None, facts):
        early = EarlyEngines(str(byte_tokenizer), inert=False, known=known)
        fast, reference = early.engines_of(facts.backend)
        for engine in (fast, reference):
            assert engine is not None
            assert all(np.array_equal(a, b) for a, b in zip(engine.encode(["some text"]), wanted, strict=True))


def test_the_reference_does_not_take_the_lock_from_the_fast_engine(
    byte_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is begun when the fast engine has done all that needs the interpreter lock, known or not, or has failed."""
    order: list[str] = []

    class Fast(FastEngine):
        def __init__(self, backend: str, *, inert: bool = False, before_building: Any = None) -> None:
            def begun() -> None:
                order.append("fast")
                before_building()

            time.sleep(0.2)
            if fails:
                order.append("failed")
                raise ValueError
            super().__init__(backend, inert=inert, before_building=begun)

    class Reference(ReferenceEngine):
        def __init__(self, *given: Any, **named: Any) -> None:
            order.append("reference")
            super().__init__(*given, **named)

    facts = load_tokenizer(str(byte_tokenizer))
    assert facts.backend is not None
    monkeypatch.setattr(early_, "FastEngine", Fast)
    monkeypatch.setattr(early_, "ReferenceEngine", Reference)
    for known in (None, facts):
        for fails in (False, True):
            order.clear()
            fast, reference = EarlyEngines(str(byte_tokenizer), inert=False, known=known).engines_of(facts.backend)
            assert order == ["failed" if fails else "fast", "reference"]
            assert (fast is None) == fails
            assert reference is not None or known is None


def test_engines_begun_at_once_are_those_of_what_is_known(tmp_path: Path, byte_tokenizer: Path) -> None:
    facts = load_tokenizer(str(byte_tokenizer))
    assert facts.backend is not None
    begun = early_.begun_at_once(str(byte_tokenizer), inert=True)
    assert begun is not None
    assert begun.fits(inert=True, known=facts)
    assert None not in begun.engines_of(facts.backend)
    for inert, known in ((False, facts), (True, None), (True, dataclasses.replace(facts, backend="{}"))):
        assert not begun.fits(inert=inert, known=known)
    other = tmp_path / "other"
    assert early_.begun_at_once(str(other), inert=True) is None
    other.mkdir()
    (other / "tokenizer.json").write_text("no JSON")
    assert early_.begun_at_once(str(other), inert=True) is None, "nothing is known of it"


def test_a_file_that_is_not_the_backend(tmp_path: Path, byte_tokenizer: Path) -> None:
    """As for Llama 2, whose tokenizer.json AutoTokenizer changes."""
    facts = load_tokenizer(str(byte_tokenizer))
    assert facts.backend is not None
    folder = shutil.copytree(byte_tokenizer, tmp_path / "other")
    value = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**value, "normalizer": None}))
    assert EarlyEngines(str(folder), inert=True).engines_of(facts.backend) == (None, None)
    (folder / "tokenizer.json").write_text("no JSON")
    assert EarlyEngines(str(folder), inert=True).engines_of(facts.backend) == (None, None)
    assert EarlyEngines("some/name", inert=False).engines_of(facts.backend) == (None, None)
