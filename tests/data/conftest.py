"""Fixtures of the data tests."""

from pathlib import Path

import pytest

from tests.data.tokenizers_for_tests import make_byte_tokenizer


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small byte-level tokenizer."""
    return make_byte_tokenizer(tmp_path_factory.mktemp("tokenizer") / "bytes")
