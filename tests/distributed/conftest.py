"""Process groups shared by the tests of this folder; a group that a failed test broke is started anew."""

from collections.abc import Callable, Iterator

import pytest

from tests.distributed.ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """`ranks(n)`: the group of n processes."""
    groups: dict[int, Ranks] = {}

    def group(world_size: int) -> Ranks:
        if world_size not in groups or not groups[world_size].alive:
            groups[world_size] = Ranks(world_size)
        return groups[world_size]

    yield group
    for each in groups.values():
        each.close()
