"""What is joined and what is left out, against the rules written down naively."""

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jllm.data.chat.records.conversation import BadRecordError, Conversation, ReadingStyle
from jllm.data.chat.records.messages import read_messages
from jllm.data.chat.records.tidying import tidy
from tests.data.chats import assistant, user

CALL = {"type": "function", "function": {"name": "f", "arguments": {}}}


def naive(roles: list[str], texts: list[str], join: str) -> list[tuple[str, str]]:
    pairs = list(zip(roles, texts, strict=True))
    while pairs and pairs[-1][0] != "assistant":
        pairs.pop()
    asked = next((i for i, (role, _) in enumerate(pairs) if role in ("user", "tool")), len(pairs))
    pairs = [pair for i, pair in enumerate(pairs) if i >= asked or pair[0] != "assistant"]
    joined: list[tuple[str, str]] = []
    for role, group in itertools.groupby(pairs, key=lambda pair: pair[0]):
        if role == "tool":
            joined += list(group)
        else:
            joined.append((role, join.join(text for _, text in group)))
    return joined


@given(roles=st.lists(st.sampled_from(["user", "assistant", "tool", "system"]), max_size=8),
       join=st.sampled_from(["\n\n", "", " "]), by_hand=st.booleans())  # fmt: skip
def test_joined_and_left_out(roles: list[str], join: str, by_hand: bool) -> None:
    texts = [f"w{number}" for number in range(len(roles))]
    messages: list[Any] = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    given_ = read_messages(messages, ReadingStyle())
    if by_hand:  # without the way that plain messages take
        given_.roles = ()
    wanted = naive(roles, texts, join)
    if not wanted or wanted[-1][0] != "assistant":
        with pytest.raises(BadRecordError):
            tidy(given_, ReadingStyle(join=join))
        return
    found = tidy(given_, ReadingStyle(join=join))
    assert [(message["role"], message["content"]) for message in found.messages] == wanted
    assert found.trained == [role == "assistant" for role, _ in wanted]
    said = "".join(message["content"] for message in found.messages)
    assert sum(found.notes.values()) == sum(text not in said for text in texts)


def test_calls_flags_and_reasoning() -> None:
    def joined(*messages: dict[str, Any]) -> list[str]:
        found: Conversation = tidy(read_messages([user("q"), *messages], ReadingStyle()), ReadingStyle())
        return [message["content"] for message in found.messages[1:]]

    assert joined(assistant("a"), assistant("b", tool_calls=[CALL])) == ["a", "b"]
    assert joined(assistant("a", tool_calls=[CALL]), assistant("b")) == ["a", "b"]
    assert joined(assistant("a", train=False), assistant("b")) == ["a", "b"]
    assert joined(assistant("a", train=False), assistant("b", masked=1), assistant("c")) == ["a\n\nb", "c"]
    assert joined(assistant("a", reasoning="x"), assistant("b")) == ["a\n\nb"]
    assert joined(assistant("a"), assistant("b", reasoning="x")) == ["a", "b"]


@pytest.mark.parametrize("nothing", ["", " ", "\n\t", None, []])
def test_an_answer_says_something(nothing: Any) -> None:
    def read(**extra: Any) -> Conversation:
        return tidy(read_messages([user("q"), {"role": "assistant", "content": nothing, **extra}], ReadingStyle()),
                    ReadingStyle())  # fmt: skip

    for empty in ({}, {"reasoning": " "}, {"tool_calls": []}, {"refusal": ""}, {"train": False}):
        with pytest.raises(BadRecordError):
            read(**empty)
    for said in ({"reasoning": "x"}, {"tool_calls": [CALL]}, {"refusal": "x"}, {"function_call": {"name": "f"}}):
        assert len(read(**said).messages) == 2
