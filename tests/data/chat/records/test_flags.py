"""Flags: yes, no, or refused by name."""

import itertools

import pytest

from jllm.data.chat.records.conversation import BadRecordError
from jllm.data.chat.records.flags import flag_of, is_flag

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
