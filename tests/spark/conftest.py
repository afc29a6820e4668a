"""What all tests of the Spark jobs use: a cluster, and a tokenizer."""

from pathlib import Path

import pytest

from tests.data.tokenizers_for_tests import make_byte_tokenizer
from tests.spark.cluster import spark as spark


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_byte_tokenizer(tmp_path_factory.mktemp("tokenizer") / "bytes")
