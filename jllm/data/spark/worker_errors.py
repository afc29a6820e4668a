"""Exceptions of Spark's workers that the driver waits for.

Spark hands the driver an exception of a worker as text, inside of others. So the worker writes one that is waited for
behind a mark that was drawn for this job, and the driver looks for the mark in whatever Spark raised.

Guarantees: nothing that stands in data or messages is taken for such an exception; any other one is left as it is.
"""

import contextlib
import json
import re
import secrets
from collections.abc import Iterator, Sequence
from typing import Any

from jllm.guards import notation


class CarriedError(Exception):
    """An exception on its way from a worker to the driver."""


class WorkerErrors:
    """The exceptions of one job that are waited for. Travels to the workers with the job.

    Args:
        kinds: their classes, each made of its message alone.
    """

    def __init__(self, kinds: Sequence[type[Exception]]) -> None:
        self.kinds = tuple(kinds)
        self._mark = secrets.token_hex(16)

    @contextlib.contextmanager
    def carried(self) -> Iterator[None]:
        """In a worker: around the work."""
        try:
            yield
        except self.kinds as error:
            number = next(i for i, kind in enumerate(self.kinds) if isinstance(error, kind))
            raise CarriedError(f"{self._mark} {json.dumps([number, str(error)])} {self._mark}") from None

    @contextlib.contextmanager
    def raised(self) -> Iterator[None]:
        """On the driver, around what runs the work: an exception of a worker is raised in place of Spark's."""
        try:
            yield
        except Exception as error:  # Spark's own, of several kinds
            of_worker = self.found_in(error)
            if of_worker is None:
                raise
            raise of_worker from None

    def found_in(self, error: BaseException) -> Exception | None:
        """On the driver: the exception of a worker that made Spark raise `error`; None where it was none of these."""
        for text in texts_of(error):
            found = re.search(rf"{self._mark} (\[.*?\]) {self._mark}", text)
            if found:
                number, message = notation.loads(found[1])
                carried: Exception = self.kinds[number](message)
                return carried
        return None


def texts_of(error: BaseException) -> Iterator[str]:
    """The messages of an exception of Spark's and of what caused it, in Python and in Java."""
    yield str(error)
    for java in causes_of(error):
        yield str(java.getMessage())
    if error.__cause__ is not None:
        yield from texts_of(error.__cause__)


def causes_of(error: BaseException) -> Iterator[Any]:
    """The exception of Java's inside one of Spark's, and what caused it, the first cause last."""
    java = getattr(error, "java_exception", None) or getattr(error, "_origin", None)
    while java is not None:
        yield java
        java = java.getCause()
