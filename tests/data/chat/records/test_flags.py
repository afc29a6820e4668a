"""Flags: yes, no, or refused by name."""

import itertools

import pytest

from jllm.data.chat.records.conversation import BadRecordError
from jllm.data.chat.records.flags import asks_for_training, flag_of, is_flag, is_measured

YES = ("train", "weight", "loss", "loss_weight", "trainable", "should_train", "lossMask", "compute-loss")
NO = ("masked", "isMasked", "is_masked", "ignore_loss")


@pytest.mark.parametrize(("value", "says"), [
    (True, True), (1, True), (1.0, True), ("true", True), ("1", True),
    (False, False), (0, False), (0.0, False), ("False", False), ("0.0", False),
])  # fmt: skip
def test_values(value: object, says: bool) -> None:
    assert [flag_of({name: value}, "it") for name in YES] == [says] * len(YES)
    assert [flag_of({name: value}, "it") for name in NO] == [not says] * len(NO)


@pytest.mark.parametrize("value", [0.5, 2, -1, "perhaps", [], {}, [1], float("nan"), ""])
def test_anything_else_is_refused_by_name(value: object) -> None:
    for name in (*YES, *NO):
        with pytest.raises(BadRecordError, match=name):
            flag_of({name: value}, "it")
    for unclear in (True, 1, [0]):
        with pytest.raises(BadRecordError, match='"mask"'):
            flag_of({"mask": unclear}, "it")


def test_no_beats_yes_and_null_is_none() -> None:
    for one, other in itertools.product((True, False), repeat=2):
        assert flag_of({"train": one, "weight": other, "role": "x"}, "it") == (one and other)
    assert flag_of({"train": None, "content": "train"}, "it") is None
    assert not is_flag("content")


def test_what_asks_for_training() -> None:
    """A weight of 1 and what is not masked stand on every message where some are told apart."""
    assert all(
        asks_for_training({name: True, "role": "user"}) for name in ("train", "loss", "should_train", "lossMask")
    )
    assert not any(asks_for_training({name: 1.0}) for name in ("weight", "loss-weight", "masked", "ignore", "content"))
    assert not asks_for_training({"train": None})


def test_a_loss_that_was_measured() -> None:
    assert all(is_measured("loss", value) for value in (2.3, -1, 0.5, 17))
    assert not any(is_measured("loss", value) for value in (0, 1, 0.0, 1.0, True, False, "2.3", None))
    assert not is_measured("weight", 2.3)
