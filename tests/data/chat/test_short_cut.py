"""The short cut: for templates that show texts as they are; others are rendered for each conversation."""

from pathlib import Path
from typing import Any

import pytest

from tests.data.chats import END, TURNS, assistant, chat_of, rendered, user, whole


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
