"""Chat templates as programs: what goes wrong in them."""

import pytest

from jllm.data.chat.formats import BadRecordError, read_conversation
from jllm.data.tokenizer.checked_engine import CheckedEngine
from jllm.data.tokenizer.facts import TokenizerFacts
from jllm.errors import UserError
from tests.data.chats import PLAIN, Chat, assistant, user


def test_template_errors(facts: TokenizerFacts, engine: CheckedEngine) -> None:
    refusing = "{%- if messages|length == 2 %}{{- raise_exception('two only') }}{%- endif %}" + PLAIN
    _, _, bad = Chat(facts, engine, refusing).encode([{"messages": [user("a"), assistant("b")]}])
    assert "two only" in bad[0].detail
    with pytest.raises(UserError, match="not a valid template"):
        Chat(facts, engine, "{% if %}").encode([{"messages": [user("a"), assistant("b")]}])
    with pytest.raises(BadRecordError):
        read_conversation({"messages": [{"role": 3}]}, "messages", {})
