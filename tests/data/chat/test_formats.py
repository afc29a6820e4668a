"""Chat records: every format says the same, and bad records are named."""

import re
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jllm.data.chat.formats import READERS, SAMPLE, commonest_format, format_of, read_conversation
from jllm.data.tokenizer.checked_engine import CheckedEngine
from jllm.data.tokenizer.facts import TokenizerFacts
from jllm.errors import UserError
from tests.data.chats import PLAIN, Chat, assistant, user


def test_formats_say_the_same(facts: TokenizerFacts, engine: CheckedEngine) -> None:
    chat = Chat(facts, engine, PLAIN)
    wanted = chat.encode([{"messages": [user("q\nmore"), assistant("r")]}])[:2]
    records: list[Any] = [
        [{"user": "q\nmore"}, {"assistant": "r"}],
        {"conversation": [{"user": "q\nmore"}, {"assistant": "r"}]},
        {"conversations": [{"from": "human", "value": "q\nmore"}, {"from": "gpt", "value": "r"}]},
        {"instruction": "q", "input": "more", "output": "r"},
        {"question": "q\nmore", "answer": "r"},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q\nmore"}]}, assistant("r")]},
        {"prompt": [user("q\nmore")], "completion": [assistant("r")]},
    ]
    fields = {"user": "question", "assistant": "answer"}
    for record in records:
        form = format_of(record)
        assert form is not None
        conversation = read_conversation(record, form, fields)
        assert chat.encode([{"messages": conversation.messages}])[:2] == wanted


def test_hand_merged_rows(facts: TokenizerFacts, engine: CheckedEngine) -> None:
    given = [{"system": "s"}, {"assistant": "early"}, {"user": "a"}, {"user": "b"}, {"assistant": "c"}, {"user": "d"}]
    for join in ("\n\n", "", " / "):
        chat = Chat(facts, engine, PLAIN, join=join)
        merged = [{"system": "s"}, {"user": f"a{join}b"}, {"assistant": "c"}]
        assert chat.encode([given], "roles")[:2] == chat.encode([merged], "roles")[:2]


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        ({"messages": [user("a")]}, "no answer"),
        ({"messages": "x"}, "wrong type"),
        ({}, "missing field"),
        ({"messages": [user("a"), assistant("b", weight=0)]}, "no answer"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}, assistant("b")]}, "unknown part"),
    ],
)
def test_bad_records_are_named(record: Any, kind: str, facts: TokenizerFacts, engine: CheckedEngine) -> None:
    good = {"messages": [user("a"), assistant("b")]}
    chat = Chat(facts, engine, PLAIN)
    ids, _, bad = chat.encode([good, record, good])
    assert len(ids) == 2
    assert [(item.kind, item.line) for item in bad] == [(kind, 2)]


LIKE = {
    "roles": {"conversation": []}, "messages": {"messages": []}, "sharegpt": {"conversations": []},
    "alpaca": {"instruction": "", "output": ""}, "completion": {"prompt": "", "completion": ""},
    "fields": {"question": "", "answer": ""}, None: {"other": 1},
}  # fmt: skip


@settings(deadline=None)
@given(names=st.lists(st.sampled_from(list(LIKE)), max_size=20))
def test_most_records_decide(names: list[str | None]) -> None:
    known = Counter(name for name in names if name)
    records = [LIKE[name] for name in names]
    if not known:
        with pytest.raises(UserError, match=re.escape(f"format ({', '.join(READERS)}); name one with --format")):
            commonest_format(records, "here")
        return
    most = max(known.values())
    assert commonest_format(records, "here") == next(name for name in names if name and known[name] == most)


def test_only_the_first_records_are_looked_at() -> None:
    records = ({"messages": []} if number < SAMPLE else {}["no"] for number in range(SAMPLE + 1))
    assert commonest_format(records, "here") == "messages"
