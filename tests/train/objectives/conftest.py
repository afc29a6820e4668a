"""The size of chunks, for tests of what works in chunks."""

import pytest

from jllm.models.pipeline import head as head_module


@pytest.fixture
def chunk(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> int:
    """Tokens of a chunk, at a vocabulary of 50."""
    monkeypatch.setattr(head_module, "CHUNK_ELEMENTS", request.param * 50)
    return int(request.param)
