"""What stands beside a conversation: used, or counted by its name."""

from typing import Any

import pytest

from jllm.data.chat.formats import read_conversation
from jllm.data.chat.records.conversation import BadRecordError, ReadingStyle
from tests.data.chats import assistant, user

MESSAGES = [user("q"), assistant("a")]
TOOLS = [{"type": "function", "function": {"name": "f"}}]
CHAT: dict[str, Any] = {"messages": MESSAGES}
RECORDS: dict[str, dict[str, Any]] = {
    "messages": CHAT,
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "roles": {"conversation": [{"user": "q"}, {"assistant": "a"}]},
    "alpaca": {"instruction": "q", "output": "a"},
    "completion": {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
    "fields": {"question": "q", "answer": "a"},
}
FIELDS = {"user": "question", "assistant": "answer"}


@pytest.mark.parametrize("form", list(RECORDS))
def test_fields_of_all_formats(form: str) -> None:
    def read(**beside: Any) -> Any:
        return read_conversation({**RECORDS[form], **beside}, form, FIELDS)

    for name in ("system", "system_prompt"):
        found = read(**{name: "s"})
        assert found.messages == [{"role": "system", "content": "s"}, *MESSAGES]
        assert not found.notes
    for name in ("tools", "functions"):
        assert read(**{name: TOOLS}).tools == TOOLS
    found = read(context="c", images=["x"], id=7, rejected="r", label="no", empty=[], null=None)
    assert found.messages == MESSAGES
    assert found.notes == {f"unused field: {name}": 1 for name in ("context", "images", "rejected", "label")}
    assert read(label=True, train=1).messages == MESSAGES
    assert read(loss=2.3).notes == {"unused field: loss": 1}
    for bad in ({"loss": 0.0}, {"weight": 2.3},
                {"label": False}, {"kto_tag": False}, {"train": False}, {"weight": 0.0}, {"loss_weight": 0.5},
                {"mask": "User"}, {"tools": [1]}, {"tools": 1}, {"system": {"a": 1}}):  # fmt: skip
        with pytest.raises(BadRecordError):
            read(**bad)


def test_texts_have_no_system_and_no_tools() -> None:
    found = read_conversation({"prompt": "a", "completion": "b", "system": "s", "tools": TOOLS}, "completion", {})
    assert found.completion == ("a", "b")
    assert found.notes == {"unused field: system": 1, "unused field: tools": 1}


def test_what_is_said_twice() -> None:
    system = {"role": "system", "content": "s"}
    found = read_conversation({"messages": [system, *MESSAGES], "system": "s"}, "messages", {})
    assert found.messages == [system, *MESSAGES]
    found = read_conversation({"messages": [system, *MESSAGES], "system": "t"}, "messages", {})
    assert found.messages[0]["content"] == "t\n\ns"
    ignoring = ReadingStyle(ignore_tools=True)
    found = read_conversation({"messages": MESSAGES, "tools": TOOLS}, "messages", {}, ignoring)
    assert found.tools is None
    assert found.notes == {"left out: lists of tools (--ignore_tools)": 1}
