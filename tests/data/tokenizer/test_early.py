"""Engines built early are used where they encode as AutoTokenizer's backend does, and nowhere else."""

import json
import shutil
from pathlib import Path

import numpy as np

from jllm.data.tokenizer.early import EarlyEngines
from jllm.data.tokenizer.engines import ReferenceEngine
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
