"""Messages in all their forms."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jllm.data.chat.records import messages
from jllm.data.chat.records.conversation import BadRecordError, Conversation, ReadingStyle
from jllm.data.chat.records.messages import ROLES, read_messages
from tests.data.chats import assistant, user

STYLE = ReadingStyle()


def one(message: dict[str, Any], **style: Any) -> dict[str, Any]:
    (found,) = read_messages([message], ReadingStyle(**style)).messages
    return found


def test_roles_have_many_names() -> None:
    for name, role in ROLES.items():
        if role != "function_call":
            assert one({"role": name.upper(), "content": "x"}) == {"role": role, "content": "x"}
    assert one({"role": "developer", "content": "x"}, developer_as_system=True)["role"] == "system"
    assert one({"role": "critic", "content": "x"}, names=frozenset(["critic"]))["role"] == "critic"
    with pytest.raises(BadRecordError, match='the role "critic"; known are'):
        one({"role": "critic", "content": "x"})
    with pytest.raises(BadRecordError, match='the role "critic"; known are'):
        one({"user": "x", "critic": "y"})


def test_calls_of_functions_have_many_forms() -> None:
    arguments = {"x": 1}
    calls = [{"type": "function", "function": {"name": "f", "arguments": arguments}}]
    wanted = {"role": "assistant", "content": "", "tool_calls": calls}
    for message in (
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "assistant", "function_call": {"name": "f", "arguments": '{"x": 1}'}},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "tool_call", "value": {"name": "f", "arguments": arguments}},
        {"assistant": "", "tool_calls": calls},
        {"function_call": {"name": "f", "arguments": arguments}},
    ):
        assert one(message) == wanted
    with pytest.raises(BadRecordError, match="is no answer"):
        one({"role": "user", "content": "x", "tool_calls": calls})


@pytest.mark.parametrize(("message", "says"), [
    ({"role": "user", "content": None}, "null"), ({"role": "user"}, "null"), ({"user": None}, "null"),
    ({"role": "user", "content": []}, "without a text"), ({"from": "human", "value": ""}, "without a text"),
    ({"role": 3, "content": "x"}, "3"), ({"content": "x"}, 'no role; it has "content"'), ({}, "no role"),
    ({"role": "user", "content": "x", "value": "y"}, "both"), (assistant("a", reasoning=["x"]), "a list"),
    (assistant("a", reasoning="x", thinking="y"), "more than one"), (user("x") | {"loss": 0.3}, '"loss" 0.3'),
    (assistant("a", train_detail=[{}]), "train_detail"), ({"assistant": "a", "weight": 0.5}, '"weight" 0.5'),
])  # fmt: skip
def test_what_says_nothing_clear_is_refused(message: dict[str, Any], says: str) -> None:
    with pytest.raises(BadRecordError, match=says):
        one(message)


def test_refusals_and_reasoning() -> None:
    assert one({"role": "assistant", "content": None, "refusal": "no"})["content"] == "no"
    assert one({"role": "assistant", "content": "a", "refusal": "no"})["content"] == "a\n\nno"
    for name in ("reasoning", "reasoning_content", "thinking"):
        found = one(assistant("a", **{name: "hm"}))
        assert found == assistant("a", reasoning="hm", reasoning_content="hm", thinking="hm")


def test_fields_of_messages_are_used_or_counted() -> None:
    messages = [user("x") | {"images": ["a.png"], "id": 3, "name": "Ann"}, assistant("y", citations=None, mood="good")]
    found = read_messages(messages, STYLE)
    assert found.notes == {f"unused field: {name} of messages": 1 for name in ("images", "name", "mood")}
    known = read_messages(messages, ReadingStyle(names=frozenset(["mood", "name"])))
    assert known.notes == {"unused field: images of messages": 1}
    assert (known.messages[0]["name"], known.messages[1]["mood"]) == ("Ann", "good")
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert read_messages([{"role": "system", "content": "s", "tools": tools}], STYLE).tools == tools


def test_flags_of_questions_are_heard() -> None:
    found = read_messages([user("x") | {"train": True}, user("y") | {"masked": 1}, {"user": "a", "assistant": "b",
                           "train": 0}], STYLE)  # fmt: skip
    assert found.trained == [True, False, False, False]
    assert found.refused == [False, True, True, True]
    assert not found.notes
    pair = read_messages([{"user": "a", "assistant": "b", "train": 1}, {"user": "c", "train": 1}], STYLE)
    assert pair.trained == [False, True, True]
    weighed = read_messages([user("x") | {"weight": 1}, user("y") | {"masked": False}, assistant("z")], STYLE)
    assert weighed.trained == [False, False, True]
    assert weighed.notes == {"left out: weights of what is no answer": 2}


def test_the_text_of_a_message_may_be_called_text() -> None:
    assert one({"role": "assistant", "text": "a"}) == assistant("a")
    found = read_messages([{"role": "user", "content": "q", "text": "t"}], STYLE)
    assert found.messages == [user("q")]
    assert found.notes == {"unused field: text of messages": 1}


_NAMES = st.sampled_from([*ROLES, "Human", " user", "critic", "", "name"])
_TEXTS = st.sampled_from(["x", "a b", "", " ", "\u2003", None, 3, ["x"], {"text": "x"}])
_FORMS = st.one_of(
    st.builds(lambda name, text: {"role": name, "content": text}, _NAMES, _TEXTS),
    st.builds(lambda name, text: {"from": name, "value": text}, _NAMES, _TEXTS),
    st.builds(lambda name, text: {"value": text, "role": name}, _NAMES, _TEXTS),
    st.builds(lambda name, text: {"from": name, "content": text}, _NAMES, _TEXTS),
    st.builds(lambda name, text: {name: text}, _NAMES, _TEXTS),
    st.builds(lambda name, text: {"content": text, "value": text, name: 1}, _NAMES, _TEXTS),
    st.builds(lambda name, text: {"role": None, "from": name, "value": text}, _NAMES, _TEXTS),
    st.sampled_from([{}, "x", {"user": "a", "assistant": "b"}, {"role": ["user"], "content": "x"}, {"content": "x"}]),
)


@settings(max_examples=400, deadline=None)
@given(found=st.lists(_FORMS, max_size=4), as_system=st.booleans())
def test_plain_messages_are_read_as_all_others_are(found: list[Any], as_system: bool) -> None:
    """The short way for most messages, and the long one."""
    style = ReadingStyle(developer_as_system=as_system)

    def read() -> Conversation | str:
        try:
            return read_messages(found, style)
        except BadRecordError as error:
            return f"{error.kind}: {error}"

    short = read()
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(messages, "_plain", lambda given: None)
        long = read()
    if isinstance(short, Conversation):
        assert short.roles in ((), tuple(message["role"] for message in short.messages))
        short.roles = ()
    assert short == long


@pytest.mark.parametrize("form", [("role", "content"), ("from", "value")])
def test_all_plain_forms_go_the_short_way(form: tuple[str, str]) -> None:
    names = ["system", "human", "gpt", "observation"]
    for given_ in ([{form[0]: name, form[1]: "x"} for name in names], [{name: "x"} for name in names]):
        assert read_messages(given_, STYLE).roles == ("system", "user", "assistant", "tool")
