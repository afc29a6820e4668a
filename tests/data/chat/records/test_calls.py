"""Calls and tools in all the forms that people write."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jllm.data.chat.records.calls import DEEPEST, calls_of, tools_of
from jllm.data.chat.records.conversation import BadRecordError

arguments = st.dictionaries(st.text(), st.none() | st.integers() | st.text() | st.lists(st.booleans()))


@given(given_=arguments, nested=st.booleans(), as_text=st.booleans(), as_list=st.booleans(), whole=st.booleans(),
       key=st.sampled_from(["arguments", "parameters", "args"]))  # fmt: skip
def test_calls_are_one_form(
    given_: dict[str, Any], nested: bool, as_text: bool, as_list: bool, whole: bool, key: str
) -> None:
    function = {"name": "f", key: json.dumps(given_) if as_text else given_}
    call: Any = {"id": "1", "function": function} if nested else function
    call = [call] if as_list else call
    (read,) = calls_of(json.dumps(call) if whole else call, "it")
    assert read["function"] == {"name": "f", "arguments": given_}
    assert read["type"] == "function"
    assert read.get("id") == ("1" if nested else None)


@pytest.mark.parametrize("call", [
    7, "no json", {"arguments": {}}, {"name": " "}, {"name": "f", "arguments": "{"}, {"name": "f", "output": "lost"},
    {"function": {"name": "f"}, "output": "lost"}, {"name": "f", "arguments": {}, "parameters": {"x": 1}}, ["x"],
])  # fmt: skip
def test_other_calls_are_refused(call: Any) -> None:
    with pytest.raises(BadRecordError, match="it has"):
        calls_of(call, "it")


def test_calls_without_arguments() -> None:
    for call in ({"name": "f"}, {"name": "f", "arguments": None}, {"name": "f", "arguments": ""}):
        assert calls_of(call, "it")[0]["function"]["arguments"] == {}


def test_tools() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    forms: list[Any] = [[tool], [{"name": "f"}], json.dumps([tool]), [json.dumps(tool)]]
    assert [tools_of(form, "it") for form in forms] == [[tool]] * 4
    assert tools_of([{"type": "code_interpreter"}], "it") == [{"type": "code_interpreter"}]
    assert [tools_of(none, "it") for none in (None, [], "", " ")] == [None] * 4


@pytest.mark.parametrize("tools", [
    [1], [None], "x", {"name": "f"}, [{"type": "function"}], [{}], [["f"]], ["f"],
    [{"type": "function", "function": "f"}], [{"function": {"description": "d"}}],
])  # fmt: skip
def test_what_describes_no_tool_is_refused(tools: Any) -> None:
    with pytest.raises(BadRecordError):
        tools_of(tools, "it")


@pytest.mark.parametrize("holder", ["[%s]", '{"in": %s}'])
@pytest.mark.parametrize("over", [0, 1, 500, 800])
def test_what_is_nested_too_deeply_is_refused(holder: str, over: int) -> None:
    """As a value, and as JSON text of one: what templates do with each level is bounded."""

    def nested(levels: int) -> str:
        text = "0"
        for _ in range(levels):
            text = holder % text
        return text

    arguments, schema = nested(DEEPEST - 3 + over), nested(DEEPEST - 3 + over)
    value = json.loads(arguments)
    forms: list[Any] = [
        lambda: calls_of([{"function": {"name": "f", "arguments": {"x": value}}}], "it"),
        lambda: calls_of({"name": "f", "arguments": f'{{"x": {arguments}}}'}, "it"),
        lambda: tools_of([{"name": "f", "parameters": {"x": value}}], "they"),
        lambda: tools_of(f'[{{"name": "f", "parameters": {{"x": {schema}}}}}]', "they"),
    ]
    for form in forms:
        if over:
            with pytest.raises(BadRecordError, match="more than 100 levels of lists and objects"):
                form()
        else:
            assert form()
