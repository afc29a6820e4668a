"""Pairs in every form, to two conversations with one prompt; what is none is refused by name."""

from typing import Any

import pytest

from jllm.data.chat.records.conversation import BadRecordError, Conversation, ReadingStyle
from jllm.data.chat.records.pairs import read_pair

STYLE = ReadingStyle()


def said(user: str) -> dict[str, str]:
    return {"role": "user", "content": user}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def plain(each: Conversation) -> tuple[list[tuple[str, str]], list[bool]]:
    return [(message["role"], message["content"]) for message in each.messages], each.trained


CHOSEN = ([("user", "ask"), ("assistant", "good")], [False, True])
REJECTED = ([("user", "ask"), ("assistant", "bad")], [False, True])
SAME: list[dict[str, Any]] = [
    {"prompt": "ask", "chosen": "good", "rejected": "bad"},
    {"question": "ask", "chosen": "good", "rejected": "bad"},
    {"prompt": [said("ask")], "chosen": [answer("good")], "rejected": [answer("bad")]},
    {"chosen": [said("ask"), answer("good")], "rejected": [said("ask"), answer("bad")]},
    {"prompt": "ask", "chosen": [said("ask"), answer("good")], "rejected": [said("ask"), answer("bad")]},
    {"chosen": "\n\nHuman: ask\n\nAssistant: good", "rejected": "\n\nHuman: ask\n\nAssistant: bad"},
    {"prompt": "\n\nHuman: ask\n\nAssistant:", "chosen": " good".strip(), "rejected": "bad"},
    {
        "conversations": [{"from": "human", "value": "ask"}],
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "bad"},
    },
    {"instruction": "ask", "input": "", "chosen": "good", "rejected": "bad"},
]


@pytest.mark.parametrize("record", SAME)
def test_forms(record: dict[str, Any]) -> None:
    chosen, rejected = read_pair(record, {}, STYLE)
    assert plain(chosen) == CHOSEN
    assert plain(rejected) == REJECTED
    assert not chosen.notes
    assert not rejected.notes


def test_field_maps_lead_into_lists() -> None:
    record = {"q": "ask", "answers": [{"text": "good"}, {"text": "bad"}], "rules": "be kind", "score": 3}
    fields = {"prompt": "q", "chosen": "answers.0.text", "rejected": "answers.1.text", "system": "rules"}
    chosen, rejected = read_pair(record, fields, STYLE)
    assert plain(chosen) == ([("system", "be kind"), *CHOSEN[0]], [False, *CHOSEN[1]])
    assert plain(rejected)[0][0] == ("system", "be kind")
    assert chosen.notes == {"unused field: score": 1}
    assert not rejected.notes, "a field of the record counts once"


def test_only_what_differs_is_trained_on() -> None:
    """The common prefix is the prompt, up to the last turn of the assistant."""
    start = [said("a"), answer("b"), said("c")]
    chosen, rejected = read_pair({"chosen": [*start, answer("d")], "rejected": [*start, answer("e")]}, {}, STYLE)
    assert chosen.trained == rejected.trained == [False, False, False, True]
    text = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: "
    chosen, rejected = read_pair({"chosen": f"{text}d", "rejected": f"{text}e"}, {}, STYLE)
    assert plain(chosen) == (
        [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")],
        [False] * 3 + [True],
    )
    assert rejected.trained == [False] * 3 + [True]


def test_what_says_the_same_again_is_no_unused_field() -> None:
    whole = [said("ask"), answer("good")]
    record = {"prompt": "ask", "messages": whole, "chosen": whole, "rejected": [said("ask"), answer("bad")]}
    assert not read_pair(record, {}, STYLE)[0].notes
    other = {**record, "prompt": "something else"}
    assert read_pair(other, {}, STYLE)[0].notes == {"unused field: prompt": 1}


BAD: list[tuple[str, Any]] = [
    ("identical pair", {"prompt": "ask", "chosen": "same", "rejected": "same"}),
    ("empty answer", {"prompt": "ask", "chosen": "good", "rejected": " "}),
    ("empty answer", {"prompt": "ask", "chosen": [], "rejected": "bad"}),
    ("empty answer", {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant:"}),
    ("missing field", {"prompt": "ask", "chosen": "good"}),
    ("missing field", {"prompt": "ask", "chosen": "good", "rejected": None}),
    ("missing field", {"chosen": "good", "rejected": "bad"}),
    ("unpaired answer", {"prompt": "ask", "completion": "good", "label": True}),
    ("prompts differ", {"chosen": [said("a"), answer("b")], "rejected": [said("c"), answer("d")]}),
    ("prompts differ", {"chosen": [said("a"), answer("b")], "rejected": [said("a"), answer("b"), answer("d")]}),
    ("no answer", {"prompt": "ask", "chosen": [said("good")], "rejected": "bad"}),
    ("wrong type", {"prompt": "ask", "chosen": 3, "rejected": "bad"}),
    ("wrong type", {"prompt": [said("ask"), answer("what")], "chosen": "good", "rejected": "bad"}),
    ("wrong type", ["good", "bad"]),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "record"), BAD)
def test_what_is_no_pair(kind: str, record: Any) -> None:
    with pytest.raises(BadRecordError) as error:
        read_pair(record, {}, STYLE)
    assert error.value.kind == kind
