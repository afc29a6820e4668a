"""Chat records: every format says the same, and bad records are named."""

import re
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jllm.data.chat.formats import READERS, SAMPLE, commonest_format, format_of, read_conversation
from jllm.data.chat.records.conversation import BadRecordError
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


ASKED = [{"role": "user", "content": "q"}]
GOOD, WORSE = {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "worse"}
PAIRS_OF = {
    "user=prompt,assistant=chosen": {"prompt": "q", "chosen": "good", "rejected": "worse"},
    "messages=prompt,assistant=chosen": {"prompt": ASKED, "chosen": [GOOD], "rejected": [WORSE]},
    "messages=chosen": {"prompt": "q", "chosen": [*ASKED, GOOD], "rejected": [*ASKED, WORSE]},
    "messages=conversations,assistant=chosen": {
        "conversations": [{"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "worse"},
    },
}


@pytest.mark.parametrize("way", list(PAIRS_OF))
def test_preference_pairs_are_named_and_their_chosen_answers_can_be_trained_on(way: str) -> None:
    record = PAIRS_OF[way]
    said = (
        "here: its records are preference pairs (chosen, rejected), not conversations; give -t preference to train on"
        f" both answers; --field_map {way} trains on"
    )
    with pytest.raises(UserError, match=re.escape(said)):
        commonest_format([record] * 3, "here")
    for form in READERS:
        if form != "fields":
            with pytest.raises(BadRecordError, match=re.escape(way)) as caught:
                read_conversation(record, form, {})
            assert caught.value.kind == "preference pair"
    found = read_conversation(record, "fields", dict(pair.split("=") for pair in way.split(",")))
    assert found.messages == [*ASKED, GOOD]
    assert found.trained == [False, True]
    assert "unused field: rejected" in found.notes


def test_a_conversation_with_a_rejected_answer_beside_it() -> None:
    record = {"messages": [*ASKED, GOOD], "chosen": "good", "rejected": "worse"}
    assert commonest_format([record], "here") == "messages"
    found = read_conversation(record, "messages", {})
    assert found.notes == {"unused field: chosen": 1, "unused field: rejected": 1}


@pytest.mark.parametrize("path", ["a.1.text", "a[1].text", "a.-1.text", "a[-1].text"])
def test_fields_lie_in_objects_and_lists(path: str) -> None:
    record = {"q": {"x": "q"}, "a": [{"text": "no"}, {"text": "good"}], "t": [{"name": "f"}], "s": "s"}
    found = read_conversation(record, "fields", {"system": "s", "user": "q.x", "assistant": path, "tools": "t"})
    assert found.messages == [{"role": "system", "content": "s"}, *ASKED, GOOD]
    assert found.tools == [{"type": "function", "function": {"name": "f"}}]
    assert not found.notes
    with pytest.raises(BadRecordError, match=re.escape('no "a.2.text"')):
        read_conversation(record, "fields", {"user": "q.x", "assistant": "a.2.text"})


@pytest.mark.parametrize("form", list(READERS))
@pytest.mark.parametrize("record", [None, 1, "x", [], [1], {}, [[]], {"messages": None, "instruction": None}])
def test_what_has_not_the_format_is_bad(form: str, record: Any) -> None:
    with pytest.raises(BadRecordError):
        read_conversation(record, form, {"user": "q", "assistant": "a"})
    if form == "messages" and isinstance(record, dict) and record:
        with pytest.raises(BadRecordError, match='"messages" is null'):
            read_conversation(record, form, {})


@pytest.mark.parametrize(
    "record", [{"instruction": "q", "output": ["a", "b"]}, {"instruction": ["a", "b"], "output": "a"},
               {"instruction": "q", "output": "a", "history": [["q", ["a", "b"]]]}],
)  # fmt: skip
def test_a_list_of_texts_is_no_answer(record: Any) -> None:
    with pytest.raises(BadRecordError, match=r'".*" is a list of texts'):
        read_conversation(record, "alpaca", {})
