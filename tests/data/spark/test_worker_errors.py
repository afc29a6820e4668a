"""Errors of Spark's workers: found in whatever Spark makes of them, and nothing else is taken for one."""

import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jllm.data.chat.short_cut import ShortCutError
from jllm.data.spark.worker_errors import CarriedError, WorkerErrors
from jllm.errors import UserError


class Java:
    """A Java exception as py4j shows it."""

    def __init__(self, message: str, cause: "Java | None") -> None:
        self._message, self._cause = message, cause

    def getMessage(self) -> str:  # noqa: N802
        return self._message

    def getCause(self) -> "Java | None":  # noqa: N802
        return self._cause


class SparkStandInError(Exception):
    """What the driver gets: perhaps an exception of Java's inside."""

    def __init__(self, text: str, java: Java | None = None) -> None:
        super().__init__(text)
        self.java_exception = java


texts = st.text(st.characters())


@settings(deadline=None)
@given(message=texts, kind=st.sampled_from([ShortCutError, UserError]), around=texts, depth=st.integers(0, 3))
def test_what_a_worker_raised_is_raised_again(message: str, kind: type[Exception], around: str, depth: int) -> None:
    errors = WorkerErrors((ShortCutError, UserError))
    in_worker: WorkerErrors = pickle.loads(pickle.dumps(errors))
    with pytest.raises(CarriedError) as carried, in_worker.carried():
        raise kind(message)
    text = f"{around}\nTraceback: CarriedError: {carried.value}\n{around}"
    java: Java | None = Java(text, None)
    for _ in range(depth):
        java = Java(around, java)
    for raised in (SparkStandInError(text), SparkStandInError(around, java)):
        found = errors.found_in(raised)
        assert type(found) is kind
        assert str(found) == str(kind(message))
    wrapped = RuntimeError(around)
    wrapped.__cause__ = SparkStandInError(text)
    assert type(errors.found_in(wrapped)) is kind
    assert WorkerErrors((ShortCutError, UserError)).found_in(SparkStandInError(text)) is None, "of another job"


def test_others_are_left_alone() -> None:
    errors = WorkerErrors((ShortCutError,))
    with pytest.raises(ZeroDivisionError), errors.carried():
        raise ZeroDivisionError
    assert (
        errors.found_in(SparkStandInError('ShortCutError: [0, "a text that looks like one"]', Java("x", None))) is None
    )
