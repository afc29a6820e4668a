"""Chat with templates and tokenizers that do unusual things: against what transformers makes of the whole text."""

from pathlib import Path
from typing import Any

import pytest
import tokenizers

from jllm.data.tokenizer.checked_engine import open_engine
from jllm.data.tokenizer.facts import load_tokenizer
from tests.data.chats import Chat, assistant, user
from tests.data.tokenizers_for_tests import make_byte_tokenizer

TURNS = "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"
END = "{{- '<|im_end|>\\n' }}{%- endfor %}"


def chat_of(folder: Path, template: str, *more: tokenizers.AddedToken, **plan: Any) -> Chat:
    facts = load_tokenizer(str(make_byte_tokenizer(folder, more=more)))
    return Chat(facts, open_engine(facts, inert=True), template, **plan)


def whole(chat: Chat, ids: list[int], text: str) -> bool:
    """Whether these are the ids of the whole text, encoded at once."""
    return bool(ids == chat.reference.encode(text, add_special_tokens=False).ids)


def rendered(messages: list[dict[str, Any]], show: Any = str, end: str = "<|im_end|>") -> str:
    return "".join(f"<|im_start|>{m['role']}\n{show(m['content'])}{end}\n" for m in messages)


@pytest.mark.parametrize(
    ("shown", "show"),
    [
        ("message.content | tojson", lambda text: '"' + text.replace('"', '\\"').replace("\n", "\\n") + '"'),
        ("'[json] ' + message.content if 'JSON' in message.content else message.content",
         lambda text: f"[json] {text}" if "JSON" in text else text),
        ("message.content[:4]", lambda text: text[:4]),
        ("'long' if message.content | length > 9 else message.content", lambda text: "long" if len(text) > 9 else text),
        ("message.content | upper", str.upper),
        ("message.content | replace('--', '-')", lambda text: text.replace("--", "-")),
    ],
)  # fmt: skip
def test_templates_that_look_at_texts(tmp_path: Path, shown: str, show: Any) -> None:
    """The short cut is for templates that show texts as they are; others are rendered for each conversation."""
    template = TURNS + "{{- (" + shown + ") if message.role == 'user' else message.content }}" + END
    chat = chat_of(tmp_path, template)
    questions = ["plain", 'say "yes"', "two\nlines", "give JSON now", "a much longer text", "one--two"]
    conversations = [[user(text), assistant("fine")] for text in questions]
    ids, labels, bad = chat.encode([{"messages": messages} for messages in conversations])
    assert not bad
    for row, label, messages in zip(ids, labels, conversations, strict=True):
        text = rendered(messages[:1], show) + rendered(messages[1:])
        assert whole(chat, row, text), chat.decode(row)
        assert chat.decode(label) == "fine<|im_end|>"


def test_the_last_answer_ends_with_another_token(tmp_path: Path) -> None:
    template = TURNS + ("{{- message.content }}{{- '<|endoftext|>' if loop.last else '<|im_end|>' }}{%- endfor %}")
    chat = chat_of(tmp_path, template)
    assert chat.trained([user("q"), assistant("one"), user("r"), assistant("two")]) == "one<|im_end|>two<|endoftext|>"
    assert chat.trained([user("q"), assistant("one")]) == "one<|endoftext|>"


def test_line_ends_that_are_tokens(tmp_path: Path) -> None:
    """As in Gemma: the header of a turn ends with one, texts hold some, and the template trims them."""
    lines = [tokenizers.AddedToken("\n" * count, special=False, normalized=False) for count in (1, 2)]
    chat = chat_of(tmp_path, TURNS + "{{- message.content | trim }}" + END, *lines)
    messages = [user("one\n\ntwo\n"), assistant("three\nfour")]
    ids, labels, bad = chat.encode([{"messages": messages}])
    assert not bad
    assert whole(chat, ids[0], rendered(messages, str.strip))
    assert chat.decode(labels[0]) == "three\nfour<|im_end|>"


@pytest.mark.parametrize("marked", [True, False])
def test_tokens_that_swallow_white_space(tmp_path: Path, marked: bool) -> None:
    """A mark of the template stands inside of what the token swallows."""
    ending = tokenizers.AddedToken("<|end|>", special=True, normalized=False, rstrip=True)
    opened, closed = ("{% generation %}", "{% endgeneration %}") if marked else ("", "")
    template = (
        TURNS + "{% if message.role == 'assistant' %}" + opened + "{{- message.content + '<|end|>' }}" + closed
        + "{% else %}{{- message.content + '<|end|>' }}{% endif %}{{- '\\n' }}{% endfor %}"
    )  # fmt: skip
    chat = chat_of(tmp_path, template, ending)
    messages = [user("q"), assistant("a b"), user("r"), assistant("c")]
    ids, labels, bad = chat.encode([{"messages": messages}])
    assert not bad
    assert whole(chat, ids[0], rendered(messages, end="<|end|>"))
    assert chat.decode(labels[0]) == "a b<|end|>c<|end|>"


def test_white_space_around_answers(tmp_path: Path) -> None:
    """What a template shows of it is part of the answer; what it trims is not there."""
    messages = [user("q"), assistant("\tcode()\n"), user("r"), assistant("\n\nx")]
    chat = chat_of(tmp_path / "as it is", TURNS + "{{- message.content }}" + END)
    assert chat.trained(messages) == "\tcode()\n<|im_end|>\n\nx<|im_end|>"
    chat = chat_of(tmp_path / "trimmed", TURNS + "{{- message.content | trim }}" + END)
    assert chat.trained(messages) == "code()<|im_end|>x<|im_end|>"


def test_spans_where_the_normalizer_keeps_the_length_of_the_whole(tmp_path: Path) -> None:
    """A letter that grows and letters that shrink under NFC: bytes add up, and tokens lie elsewhere all the same."""
    template = "{%- for message in messages %}{{- message.role + ': ' + message.content + ' ' }}{%- endfor %}"
    chat = chat_of(tmp_path, template)
    grows, shrinks = "\u0958 " * 2, "re\u0301sume\u0301 cafe\u0301 de\u0301ja\u0300 e\u0301"
    answer = chat.trained([user(f"{grows}here"), assistant(shrinks)])
    assert answer.strip() == "résumé café déjà é"


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


def test_a_template_that_shows_messages_twice(tmp_path: Path) -> None:
    chat = chat_of(tmp_path, TURNS + "{{- message.content + ' ' + message.content }}" + END)
    ids, _, bad = chat.encode([{"messages": [user("q"), assistant("yes")]}])
    assert not bad
    assert whole(chat, ids[0], rendered([user("q q"), assistant("yes yes")]))
