"""Fixtures of the chat tests."""

from pathlib import Path

import pytest

from jllm.data.tokenizer.checked_engine import CheckedEngine, open_engine
from jllm.data.tokenizer.facts import TokenizerFacts, load_tokenizer


@pytest.fixture(scope="module")
def facts(byte_tokenizer: Path) -> TokenizerFacts:
    return load_tokenizer(str(byte_tokenizer))


@pytest.fixture(scope="module")
def engine(facts: TokenizerFacts) -> CheckedEngine:
    return open_engine(facts, inert=True)
