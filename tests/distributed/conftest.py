"""Process groups for the tests of this folder."""

from collections.abc import Callable

import pytest

from tests.distributed.ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Callable[[int], Ranks]:
    """`ranks(n)`: n processes."""
    return Ranks
