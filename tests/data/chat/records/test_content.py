"""Contents: what is no text is named."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jllm.data.chat.records.content import content_of, text_of
from jllm.data.chat.records.conversation import BadRecordError


@given(texts=st.lists(st.text()), kind=st.sampled_from(["text", "input_text", "output_text", None]))
def test_parts_are_one_text(texts: list[str], kind: str | None) -> None:
    parts = [{"text": text, **({"type": kind} if kind else {}), "image_url": None} for text in texts]
    assert content_of(parts, "it").text == "".join(texts)
    assert text_of("".join(texts), "it") == "".join(texts)


def test_other_parts_that_say_something() -> None:
    parts = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "a"}, {"type": "refusal", "refusal": "b"}]
    assert content_of(parts, "it") == ("ab", "hm")
    assert content_of(None, "it") == ("", "")
    with pytest.raises(BadRecordError, match="reasoning"):
        text_of(parts, "it")


@pytest.mark.parametrize(("value", "says"), [
    (["a", "b"], "list of texts"), (["a"], "list of texts"), ([1], "a number"), ([None], "null"),
    ({"text": "a"}, "an object"), (7, "a number"), (False, "false"),
    ([{"type": "image_url", "image_url": "x"}], '"image_url"'), ([{"type": "image", "text": "a"}], '"image"'),
    ([{"type": "text", "text": "a", "image": {"url": "x"}}], '"image"'), ([{"type": "text"}], "null"),
    ([{"type": ["x"], "text": "a"}], "x"), ([{"type": "tool_use", "name": "f"}], '"tool_use"'),
])  # fmt: skip
def test_what_is_no_text_is_named(value: Any, says: str) -> None:
    with pytest.raises(BadRecordError, match=says):
        content_of(value, "it")
