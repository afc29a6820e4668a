"""Passes in which a rank waits for no other one: those that it may break off, and whose numbers nobody keeps.

Guarantees: within `alone` the collectives of layers give numbers of the right shapes at once, whatever other ranks do.
"""

import contextlib
from collections.abc import Iterator

_running = 0


def is_alone() -> bool:
    """Whether the pass that runs now is such a one."""
    return _running > 0


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside it nothing passes between ranks: what others would give is this rank's own, or nothing."""
    global _running
    _running += 1
    try:
        yield
    finally:
        _running -= 1
