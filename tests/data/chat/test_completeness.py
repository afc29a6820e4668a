"""What templates leave out is found, whatever it is and wherever it stands."""

from pathlib import Path
from typing import Any

import pytest

from jllm.data.chat.completeness import Completeness
from jllm.data.chat.records.conversation import LEFT_OUT, BadRecordError
from tests.data.chats import AGENT, END, PLAIN, THINKING, TURNS, Chat, assistant, chat_of, user

CALL = {"type": "function", "function": {"name": "find", "arguments": {"what": "a thing", "n": [1, True, None]}}}
TOOL = {"type": "function", "function": {"name": "find", "description": "finds", "parameters": {"type": "object"}}}
ONLY = "{%- for message in messages if message.role in ('user', 'assistant') %}" + PLAIN.split("%}", 1)[1]
NO_NUMBERS = (
    TURNS + "{{- message.content }}{%- for call in message.tool_calls or [] %}"
    "{{- call.function.name + ': ' }}{%- for key, value in call.function.arguments.items() if value is string %}"
    "{{- key + '=' + value }}{%- endfor %}{%- endfor %}" + END
)


@pytest.mark.parametrize(
    ("template", "messages", "tools", "kind"),
    [
        (ONLY, [{"role": "system", "content": "s"}, user("a system"), assistant("s")], None, "message not shown"),
        (ONLY, [user("a"), {"role": "tool", "content": "user"}, assistant("b")], None, "message not shown"),
        (PLAIN, [user("find"), assistant("find", tool_calls=[CALL]), user("r"), assistant("s")], None,
         "tool call not found"),
        (NO_NUMBERS, [user("q"), assistant("", tool_calls=[CALL])], None, "tool call not found"),
        (PLAIN, [user("find"), assistant("finds")], [TOOL], "tools not shown"),
        (PLAIN, [user("q"), assistant("b", reasoning_content="user")], None, "reasoning not shown"),
        (PLAIN, [user("q"), assistant("b", reasoning="user"), user("r"), assistant("c")], None, "reasoning not shown"),
        (AGENT, [user("q"), assistant("", reasoning="x"), user("r"), assistant("c")], None, "empty answer"),
    ],
)  # fmt: skip
def test_what_is_left_out_is_named(tmp_path: Path, template: str, messages: Any, tools: Any, kind: str) -> None:
    """Also where the same words stand elsewhere."""
    chat = chat_of(tmp_path, template)
    for train_on_prompt in (False, True):
        chat = Chat(chat.facts, chat.encoder.assembler.engine, template, train_on_prompt=train_on_prompt)
        record = {"messages": messages, **({"tools": tools} if tools else {})}
        ids, _, [bad], _ = chat.encode_as("jsonl", [record], "messages")
        assert (ids, bad.kind) == ([], kind)


def test_what_may_be_left_out_is_counted(tmp_path: Path) -> None:
    chat = chat_of(tmp_path / "agent", AGENT)
    messages = [user("q"), assistant("a", reasoning_content="early"), user("r"), assistant("b", reasoning="late")]
    ids, _, bad, counts = chat.encode_as("jsonl", [{"messages": messages}] * 3, "messages")
    assert not bad
    assert "early" not in chat.decode(ids[0])
    assert "late" in chat.decode(ids[0])
    assert counts[f"{LEFT_OUT}reasoning of earlier turns, by the template"] == 3
    plain = chat_of(tmp_path / "plain", PLAIN, ignore_tools=True)
    _, _, bad, counts = plain.encode_as(
        "jsonl", [{"messages": [user("q"), assistant("a")], "tools": [TOOL]}], "messages"
    )
    assert not bad
    assert counts[f"{LEFT_OUT}lists of tools (--ignore_tools)"] == 1


CONDITIONS = {
    "'secret' not in message.content": ("a secret word", "a public word"),
    "message.content != 'skip me'": ("skip me", "skip it"),
    "message.content | length < 30": ("long " * 8, "short"),
    "message.content.split() | length != 4": ("one two three four", "one two three"),
    "message.content | length < 30000": ("x" * 40_000, "short"),
    "'<hidden>' not in message.content": ("<hidden> thing", "<shown> thing"),
    "not message.content.isupper()": ("SHOUTING WORDS", "Quiet words"),
}


@pytest.mark.parametrize("condition", list(CONDITIONS))
def test_a_message_that_is_left_out_because_of_its_text(tmp_path: Path, condition: str) -> None:
    """Whatever its role; also by the short cut, and where everything is trained on."""
    template = TURNS.replace("%}", "%}{%- if " + condition + " %}", 1) + "{{- message.content }}"
    template += END.replace("{%- endfor", "{%- endif %}{%- endfor")
    hidden, seen = CONDITIONS[condition]
    for everything in (False, True):
        chat = chat_of(tmp_path, template, train_on_prompt=everything)
        for role in ("system", "user", "assistant"):
            texts = {"system": "rule", "user": "why", "assistant": "so"}
            records = [
                {"messages": [{"role": each, "content": text if each == role else texts[each]} for each in texts]}
                for text in (seen, hidden, seen)
            ]
            ids, _, bad = chat.encode(records)
            assert [record.line for record in bad] == [2], role
            assert len(ids) == 2


def test_a_message_that_repeats_another(tmp_path: Path) -> None:
    """What a template leaves out because it was said before stands in the text all the same, but in another place."""
    once = TURNS.replace("%}", "%}{%- if loop.first or message.content != loop.previtem.content %}", 1)
    once += "{{- message.content }}" + END.replace("{%- endfor", "{%- endif %}{%- endfor")
    records = [{"messages": [user("q"), assistant(answer), user("r"), assistant("s")]} for answer in ("a", "q")]
    ids, _, bad = chat_of(tmp_path, once).encode(records)
    assert len(ids) == 1
    assert [record.line for record in bad] == [2]


def test_a_message_of_which_some_is_shown_is_counted(tmp_path: Path) -> None:
    """Cut, or with something in it replaced; in other letters, or as JSON writes it, it is all there."""
    text = 'The quick brown fox, said /no_think, jumps over the "lazy" dog.'
    for show, times in (("message.content[:30]", 1), ("message.content.replace('/no_think', '')", 1),
                        ("message.content | upper", 0), ("message.content | tojson", 0)):  # fmt: skip
        template = TURNS + "{{- (" + show + ") if message.role == 'user' else message.content }}" + END
        ids, _, bad, counts = chat_of(tmp_path, template).encode_as(
            "jsonl", [{"messages": [user(text), assistant("b")]}], "messages"
        )
        assert (len(ids), bad) == (1, [])
        assert counts.get(f"{LEFT_OUT}text of messages that the template cuts or replaces", 0) == times


def test_a_system_text_may_be_moved(tmp_path: Path) -> None:
    moved = (
        "{%- for message in messages if message.role != 'system' %}{{- '<|im_start|>' + message.role + '\\n' }}"
        "{%- if loop.revindex == 2 %}{{- messages[0].content + '\\n\\n' }}{%- endif %}"
        "{{- message.content + '<|im_end|>\\n' }}{%- endfor %}"
    )
    turns = [{"role": "system", "content": "be terse"}, user("q"), assistant("a"), user("r"), assistant("b")]
    ids, _, bad = chat_of(tmp_path, moved).encode([{"messages": turns}])
    assert (len(ids), bad) == (1, [])


def test_text_around_a_think_block_is_looked_up(tmp_path: Path) -> None:
    cut = TURNS + "{{- message.content.split('</think>')[-1] }}" + END
    records = [{"messages": [user("q"), assistant(text)]} for text in
               ("a", "one<think>x</think>two", "<think>x</think>two")]  # fmt: skip
    for everything in (False, True):  # without marks nothing else looks for answers
        ids, _, bad = chat_of(tmp_path, cut, train_on_prompt=everything).encode(records)
        assert len(ids) == 1
        assert [record.line for record in bad] == [2, 3]


def test_what_stands_before_a_think_block_is_looked_up(tmp_path: Path) -> None:
    """The template shows reasoning and what is behind it; with other words before it, these are lost."""
    for everything in (False, True):
        chat = chat_of(tmp_path, THINKING, train_on_prompt=everything)
        texts = ("<think>x</think>two", "one <think>x</think>two")
        ids, _, [bad] = chat.encode([{"messages": [user("q"), assistant(text)]} for text in texts])
        assert len(ids) == 1
        assert (bad.line, bad.kind) == (2, "message not shown")


def test_a_shape_is_rendered_once() -> None:
    seen = []

    def render(messages: Any, tools: Any) -> str:
        seen.append(messages)
        if len(messages) == 3:
            raise BadRecordError("template error", "no three")
        return "".join(message["content"] for message in messages)

    completeness = Completeness(render)
    for text in ("a", "b", "a" * 100):
        assert not completeness.thoughts_left_out([user(text), assistant(text)], None)
        assert not completeness.thoughts_left_out([user(text), assistant(text), user("x")], None)
    assert len(seen) == 2


def test_names_that_a_template_does_not_show_are_counted(tmp_path: Path) -> None:
    """Also where it speaks of names elsewhere, as of those of tools."""
    calls = "{%- for call in message.tool_calls or [] %}{{- call.name }}{%- endfor %}"
    shown = "{%- if message.name %}{{- message.name + ': ' }}{%- endif %}"
    messages = [user("q") | {"name": "Bob"}, assistant("a"), user("r") | {"name": "Ann"}, assistant("b")]
    for part, times in (("", 2), (calls, 2), (shown, 0)):
        template = TURNS + part + "{{- message.content }}" + END
        _, _, bad, counts = chat_of(tmp_path, template).encode_as("jsonl", [{"messages": messages}], "messages")
        assert not bad
        assert counts.get("unused field: name of messages", 0) == times
