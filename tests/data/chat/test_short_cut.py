"""The short cut: for templates that show texts as they are; others are rendered for each conversation."""

import itertools
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jllm.data.chat.builtin_templates import TEMPLATES
from jllm.data.chat.formats import read_conversation
from jllm.data.chat.records.conversation import BadRecordError
from jllm.data.chat.short_cut import ConversationRenderer, ShortCutError
from jllm.data.tokenizer.checked_engine import CheckedEngine
from jllm.data.tokenizer.facts import TokenizerFacts
from tests.data.chats import END, ODD, PLAIN, THINKING, TURNS, Chat, assistant, chat_of, rendered, user, whole


@pytest.mark.parametrize(
    ("shown", "show"),
    [
        ("message.content | tojson", lambda text: '"' + text.replace('"', '\\"').replace("\n", "\\n") + '"'),
        ("'[json] ' + message.content if 'JSON' in message.content else message.content",
         lambda text: f"[json] {text}" if "JSON" in text else text),
        ("message.content[:11]", lambda text: text[:11]),
        ("'long: ' ~ message.content if message.content | length > 9 else message.content",
         lambda text: f"long: {text}" if len(text) > 9 else text),
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


EXAMPLES = 40 * int(os.environ.get("JLLM_TEST_SIZE", "1"))
texts = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("abc \n<|'")), min_size=1, max_size=12)
answers = texts.filter(str.strip)


@pytest.mark.parametrize("name", ["plain", "trimming", "thinking", "chatml", "llama-3"])
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(turns=st.lists(st.lists(st.tuples(texts, answers), min_size=1, max_size=3), max_size=4), last=st.booleans())
def test_the_short_cut_does_not_show(
    name: str, turns: list[list[tuple[str, str]]], last: bool, facts: TokenizerFacts, engine: CheckedEngine
) -> None:
    trimming = TURNS + "{{- message.content | trim }}" + END
    template = {"plain": PLAIN, "trimming": trimming, "thinking": THINKING, **TEMPLATES}[name]
    conversations = [
        read_conversation({"messages": [m for q, a in pairs for m in (user(q), assistant(a))]}, "messages", {})
        for pairs in turns
    ]
    found = []
    for short_cut in (True, False):
        plan = Chat(facts, engine, template, short_cut=short_cut, train_on="last" if last else "all").plan
        renderer = ConversationRenderer(plan)
        found.append([renderer.flat(conversation)[0] for conversation in conversations])
    assert found[0] == found[1]


def test_a_verified_text_that_the_template_leaves_out(facts: TokenizerFacts, engine: CheckedEngine) -> None:
    """In a way that no probe brings out: the short cut fails, and without it the record is bad."""
    template = ODD.replace("'odd ' if", "'' if").replace("{{- message.content }}", "{{- message.content if {} }}")
    template = template.replace("{}", "message.content | length != 41 * 41")
    odd = read_conversation({"messages": [user("x" * 41 * 41), assistant("yes")]}, "messages", {})
    with pytest.raises(ShortCutError, match="in its own way: the template does not show message 0"):
        ConversationRenderer(Chat(facts, engine, template).plan).flat(odd)
    with pytest.raises(BadRecordError, match="does not show message 0"):
        ConversationRenderer(Chat(facts, engine, template, short_cut=False).plan).flat(odd)


def test_every_128th_conversation_of_a_chunk_is_verified(facts: TokenizerFacts, engine: CheckedEngine) -> None:
    renderer = ConversationRenderer(Chat(facts, engine, ODD).plan)
    plain, odd = (
        read_conversation({"messages": [user("x" * size), assistant("yes")]}, "messages", {}) for size in (9, 41 * 41)
    )
    for place in (0, 128):
        renderer.begin_chunk()
        for _ in range(place):
            renderer.flat(plain)
        with pytest.raises(ShortCutError, match="in its own way"):
            renderer.flat(odd)
    renderer.begin_chunk()
    shown = [renderer.flat(conversation)[1] for conversation in itertools.chain([plain, odd], [plain] * 127)]
    assert [number for number, whole in enumerate(shown) if whole is not None] == [0, 128]
    careful = ConversationRenderer(Chat(facts, engine, ODD, short_cut=False).plan)
    assert "odd" in careful.flat(odd)[0].texts[0]
