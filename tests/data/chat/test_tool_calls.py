"""Tool calls: shown as templates want them, and trained on."""

from pathlib import Path

import pytest

from jllm.data.chat.tool_calls import WITH_A_CALL, calls_as
from jllm.data.tokenizer.checked_engine import CheckedEngine
from jllm.data.tokenizer.facts import TokenizerFacts
from tests.data.chats import END, THINKING, TURNS, Chat, assistant, chat_of, user


def test_tool_calls_are_trained(facts: TokenizerFacts, engine: CheckedEngine) -> None:
    chat = Chat(facts, engine, THINKING)
    call = {"function": {"name": "f", "arguments": '{"x": 1}'}}
    said = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call><|im_end|>'
    messages = [user("a"), assistant("", tool_calls=[call]), {"role": "tool", "content": "7"}, assistant("It is 7.")]
    assert chat.trained(messages) == said + "It is 7.<|im_end|>"
    said = chat.trained([user("a"), assistant("Look: ", tool_calls=[call]), user("b"), assistant("c")])
    assert said.startswith("Look:")


def test_tool_calls_that_a_template_leaves_out(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "find", "arguments": {"x": 1}}}
    chat = chat_of(tmp_path, TURNS + "{{- message.content }}" + END)
    messages = [user("q"), assistant("", tool_calls=[call]), {"role": "tool", "content": "1"}, assistant("one")]
    _, _, bad = chat.encode([{"messages": messages}])
    assert [record.kind for record in bad] == ["tool call not found"]


ARGUMENTS_JOINED = """{%- for call in message.tool_calls or [] %}
{{- '<call>' + call.function.name + '\\n' + call.function.arguments + '</call>' }}{%- endfor %}"""


@pytest.mark.parametrize(
    "shown",
    [
        "{{- message.content }}" + ARGUMENTS_JOINED,
        "{%- if message.content is none %}" + ARGUMENTS_JOINED + "{%- else %}{{- message.content }}{%- endif %}",
        "{%- if message.content is none %}" + ARGUMENTS_JOINED.replace("arguments", "arguments | tojson")
        + "{%- else %}{{- message.content }}{%- endif %}",
    ],
    ids=["text", "text and null", "object and null"],
)  # fmt: skip
def test_templates_with_tool_calls_of_their_own_form(tmp_path: Path, shown: str) -> None:
    """DeepSeek's joins arguments to its own text, which an object cannot be, and shows calls where content is null."""
    chat = chat_of(tmp_path, TURNS + shown + END)
    said = '<call>weather\n{"city": "Zürich", "days": [1, 2]}</call><|im_end|>'
    for arguments in ({"city": "Zürich", "days": [1, 2]}, '{"city": "Z\\u00fcrich", "days": [1, 2]}'):
        call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
        for content in ("", None):
            messages = [
                user("Look it up."),
                {"role": "assistant", "content": content, "tool_calls": [call]},
                {"role": "tool", "content": "sun"},
                assistant("Sun."),
            ]
            assert chat.trained(messages) == said + "Sun.<|im_end|>"


def test_a_template_that_does_not_end_a_tool_call(tmp_path: Path) -> None:
    """What the tool says would be trained on; such records are refused by name, others are not."""
    end = "{%- if not message.tool_calls %}{{- '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    chat = chat_of(tmp_path, TURNS + "{{- message.content }}" + ARGUMENTS_JOINED + end)
    call = {"type": "function", "function": {"name": "weather", "arguments": {}}}
    asked = [user("?"), assistant("", tool_calls=[call]), {"role": "tool", "content": "sun"}, assistant("Sun.")]
    ids, _, [bad] = chat.encode([{"messages": asked}, {"messages": [user("?"), assistant("!")]}])
    assert len(ids) == 1
    assert (bad.kind, bad.line) == ("template error", 1)
    assert "does not end an answer that calls a tool" in bad.detail


def test_calls_are_written_as_asked_for() -> None:
    for message in WITH_A_CALL:
        before = repr(message)
        assert calls_as(message, as_text=False, without_content=False) == message
        changed = calls_as(message, as_text=True, without_content=True)
        assert repr(message) == before, "the record itself stays"
        if "tool_calls" not in message:
            assert changed is message
            continue
        assert changed["content"] is None
        assert changed["tool_calls"][0]["function"]["arguments"] == '{"argument": "its_value"}'
    kept = calls_as({**WITH_A_CALL[1], "content": "Look:"}, as_text=False, without_content=True)
    assert kept["content"] == "Look:"
