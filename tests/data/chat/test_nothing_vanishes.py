"""Conversations in all formats, out of all kinds of files: every text that went in comes out, is counted as left out,
or its record is refused by name; nothing whose flag says no is in labels."""

import dataclasses
import json
import os
import re
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st

from jllm.data.chat.builtin_templates import TEMPLATES
from jllm.data.chat.records.conversation import LEFT_OUT, UNUSED
from jllm.data.tokenizer.checked_engine import CheckedEngine, open_engine
from jllm.data.tokenizer.facts import TokenizerFacts, load_tokenizer
from tests.data.chats import AGENT, PLAIN, THINKING, Chat
from tests.data.tokenizers_for_tests import asset_tokenizer

EXAMPLES = 40 * int(os.environ.get("JLLM_TEST_SIZE", "1"))
SHAREGPT = {"user": "human", "assistant": "gpt", "tool": "observation", "system": "system", "developer": "developer"}
YES = [("train", True), ("weight", 1.0), ("loss_weight", 1), ("masked", False), ("loss", "true"), ("trainable", 1)]
ASKS = [("train", True), ("loss", "true"), ("trainable", 1)]  # also for what is no answer
NO = [("train", False), ("weight", 0), ("loss_weight", 0.0), ("masked", True), ("isMasked", 1), ("loss", "false")]
BEYOND = [("train", 0.5), ("weight", 2), ("masked", "perhaps"), ("loss_weight", -1)]


@dataclasses.dataclass
class Said:
    """A message before it is written in a format; texts are words that stand nowhere else."""

    role: str
    text: str = ""
    thought: str = ""
    call: str = ""
    flag: tuple[str, Any] | None = None

    @property
    def words(self) -> list[str]:
        return re.findall(r"w\d+q", " ".join((self.text, self.thought, self.call)))

    @property
    def refused(self) -> bool:
        return self.flag in NO

    @property
    def trained(self) -> bool:
        return self.role == "assistant" or self.flag in ASKS

    @property
    def empty(self) -> bool:
        return not (self.text.strip() or self.thought.strip() or self.call)


@st.composite
def conversations(draw: st.DrawFn) -> list[Said]:
    count = 0

    def words(*around: str) -> str:
        nonlocal count
        count += 1
        return draw(st.sampled_from(around or ("{}",))).format(f"w{count}q")

    edges = ("{}", "  {}", "{}\n", "\n\n{} \n", "é{}日", "<b>{}</b>", '"{}"')
    wild = not draw(st.integers(0, 3))
    flags = st.sampled_from([None, None, None, *YES, *NO, *(BEYOND if wild else ())])
    messages = []
    roles = st.sampled_from(["user", "assistant", "user", "assistant", "tool", "system", "developer"])
    for role in draw(st.lists(roles, min_size=1, max_size=6)):
        said = Said(role, flag=draw(flags))
        if role != "assistant" or draw(st.integers(0, 5)):
            said.text = words(*edges)
        elif wild:
            said.text = draw(st.sampled_from(["", "  \n"]))
        if role == "assistant":
            said.thought = words() if not draw(st.integers(0, 3)) else ""
            said.call = words() if (said.empty and not wild) or not draw(st.integers(0, 3)) else ""
        messages.append(said)
    return messages if wild else [Said("user", words()), *messages, Said("assistant", words())]


def written(messages: list[Said], form: str, aside: bool) -> Any:
    """The record of a conversation in one of the formats; `aside`: what has two ways is told the other way."""
    turns: list[dict[str, Any]] = []
    for said in messages:
        call = {"name": f"f{said.call}", "arguments": {"argument": said.call}}
        turn: dict[str, Any] = dict([said.flag] if said.flag else [])
        if said.thought:
            turn["reasoning_content" if aside else "reasoning"] = said.thought
        if said.call:
            as_text = {**call, "arguments": json.dumps(call["arguments"])}
            turn.update({"function_call": as_text} if aside else {"tool_calls": [{"function": call}]})
        if form == "messages":
            parts: Any = [{"type": "text", "text": said.text}] if aside and said.text else said.text
            turn = {"role": said.role, "content": parts, **turn}
        elif form == "sharegpt":
            turn = {"from": SHAREGPT[said.role], "value": said.text, **turn}
        else:
            turn = {said.role: said.text, **turn}
        turns.append(turn)
    return {{"messages": "messages", "sharegpt": "conversations", "roles": "conversation"}[form]: turns}


def expected_left_out(messages: list[Said]) -> tuple[list[Said], list[Said]]:
    """What is left out before the first question and behind the last answer, and what stays, written down naively."""
    last = max((i for i, said in enumerate(messages) if said.trained), default=-1)
    behind, rest = messages[last + 1 :], messages[: last + 1]
    asked = next((i for i, said in enumerate(rest) if said.role in ("user", "tool")), len(rest))
    early = [said for said in rest[:asked] if said.role == "assistant"]
    return [*early, *behind], [said for i, said in enumerate(rest) if not (i < asked and said.role == "assistant")]


def check(
    chat: Chat, kind: str, form: str, conversation: list[Said], record: Any, beside: list[str], shows_all: bool
) -> None:
    ids, labels, bad, counts = chat.encode_as(kind, [record], form)
    assert len(ids) + len(bad) == 1
    left_out, kept = expected_left_out(conversation)
    event(bad[0].kind if bad else "good")
    asked = max((i for i, said in enumerate(kept) if said.role == "user"), default=-1)
    if bad:
        assert bad[0].detail
        answers = [said for said in kept if said.role == "assistant"]
        thoughtful = any(not said.text.strip() and not said.call for said in answers)
        usable = any(not said.refused for said in answers) and not any(said.flag in BEYOND for said in conversation)
        assert not (shows_all and usable) or thoughtful, bad[0]
        return
    assert not any(said.empty for said in kept if said.role == "assistant"), "an empty answer is a bad record"
    assert not any(said.flag in BEYOND for said in conversation)
    shown, trained = chat.decode(ids[0]), chat.decode(labels[0])
    notes = {name: count for name, count in counts.items() if name.startswith((LEFT_OUT, UNUSED))}
    edges = sum(notes.get(f"{LEFT_OUT}{what}", 0) for what in
                ("answers before the first question", "messages after the last answer"))  # fmt: skip
    assert edges == len(left_out)
    thoughts = 0
    for number, said in enumerate(kept):
        for word in said.words:
            if word not in shown:
                assert word in said.thought, f"{word} vanished"
                assert number < asked, f"{word}, reasoning of the last turn, vanished"
                thoughts += 1
        in_labels = any(word in trained for word in said.words)
        if said.refused:
            assert not in_labels, "a flag says no"
        elif said.role == "assistant":
            assert in_labels or said.words == re.findall(r"w\d+q", said.thought)
            assert chat.plan.train_on_prompt or said.text.strip() in trained
        elif not chat.plan.train_on_prompt:
            assert in_labels == said.trained
    assert notes.get(f"{LEFT_OUT}reasoning of earlier turns, by the template", 0) == thoughts
    for text in beside:
        assert text in shown or any(name.startswith(UNUSED) for name in notes)


DEVELOPER = [Said("developer", "w1q"), Said("user", "w2q"), Said("assistant", "w3q")]
TOOLS = [
    Said(role="user", text="w6q"),
    Said(role="user", text="w1q"),
    Said(role="user", text="w2q"),
    Said(role="tool", text="w3q", flag=("train", True)),
    Said(role="tool", text="w4q"),
    Said(role="tool", text="w5q", flag=("train", True)),
    Said(role="assistant", text="w7q"),
]
FLAGGED = [Said("user", "w1q"), Said("assistant", "w2q", flag=("train", False)), Said("user", "w3q"),
           Said("assistant", "w4q")]  # fmt: skip


def storable(kind: str, record: Any) -> str:
    """The kind of file, but JSON where Parquet has no type for a field."""
    if kind == "parquet":
        try:
            pa.Table.from_pylist([record])
        except pa.ArrowException:
            return "json"
    return kind


TEMPLATES_HERE = {"agent": AGENT, "plain": PLAIN, "thinking": THINKING, "marked": TEMPLATES["chatml"], "real": ""}


class Chats:
    """What encodes with each template, made when it is first asked for; without a long repr."""

    def __init__(self, facts: TokenizerFacts, engine: CheckedEngine) -> None:
        self.made = {name: (facts, engine, template) for name, template in TEMPLATES_HERE.items() if template}

    def get(self, name: str, **plan: Any) -> Chat:
        if name not in self.made:
            facts = load_tokenizer(str(asset_tokenizer("qwen3")))
            assert facts.chat_template is not None
            self.made[name] = (facts, open_engine(facts, inert=True), facts.chat_template)
        return Chat(*self.made[name], **plan)


@pytest.fixture(scope="module")
def chats(facts: TokenizerFacts, engine: CheckedEngine) -> Chats:
    return Chats(facts, engine)


@pytest.mark.parametrize("template", list(TEMPLATES_HERE))
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    conversation=conversations(),
    form=st.sampled_from(["messages", "sharegpt", "roles"]),
    kind=st.sampled_from(["jsonl", "json", "parquet"]),
    aside=st.booleans(),
    beside=st.sampled_from([None, "system", "context", "tools"]),
    everything=st.booleans(),
    join=st.sampled_from(["\n\n", ""]),
)
@example(conversation=TOOLS, form="messages", kind="jsonl", aside=False, beside=None, everything=False, join="\n\n")
@example(conversation=DEVELOPER, form="messages", kind="jsonl", aside=False, beside=None, everything=False, join="")
@example(conversation=FLAGGED, form="sharegpt", kind="parquet", aside=False, beside="system", everything=True, join="")
def test_what_went_in_comes_out_or_is_named(
    template: str,
    conversation: list[Said],
    form: str,
    kind: str,
    aside: bool,
    beside: str | None,
    everything: bool,
    join: str,
    chats: Chats,
) -> None:
    chat = chats.get(template, train_on_prompt=everything, join=join)
    record = written(conversation, form, aside)
    function = {"name": "besides", "description": "d", "parameters": {"type": "object", "properties": {}}}
    fields = {"tools": json.dumps([{"type": "function", "function": function}]), None: None}
    if beside:
        record[beside] = fields.get(beside, "besides")
    check(
        chat,
        storable(kind, record),
        form,
        conversation,
        record,
        ["besides"] if beside else [],
        template in ("agent", "real"),
    )


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    form=st.sampled_from(["alpaca", "completion", "fields"]),
    kind=st.sampled_from(["jsonl", "json", "parquet"]),
    answer=st.sampled_from(["w1q", " w1q\n", "", "  ", None, ["w1q", "w2q"], {"a": "w1q"}, 7, False]),
    question=st.sampled_from(["w3q", "w3q\nmore", None, ["w3q"]]),
    flag=st.sampled_from([None, *YES, *NO, *BEYOND]),
    label=st.sampled_from([None, True, False, "w4q", 3]),
    system=st.sampled_from([None, "w5q", ""]),
    context=st.sampled_from([None, "w6q"]),
)
def test_single_answers(
    form: str,
    kind: str,
    answer: Any,
    question: Any,
    flag: tuple[str, Any] | None,
    label: Any,
    system: str | None,
    context: str | None,
    chats: Chats,
) -> None:
    names = {"alpaca": ("instruction", "output"), "completion": ("prompt", "completion"), "fields": ("q", "a.0.text")}
    asked, said = names[form]
    record = {asked: question, **({"a": [{"text": answer}]} if form == "fields" else {said: answer})}
    record |= {"label": label, "system": system, "context": context, **dict([flag] if flag else [])}
    mapping = {"system": "system", "user": "q", "assistant": said}
    chat = chats.get("plain")
    ids, labels, bad, counts = chat.encode_as(storable(kind, record), [record], form, mapping)
    good = isinstance(answer, str) and answer.strip() and isinstance(question, str)
    if not good or flag in NO or flag in BEYOND or label is False:
        assert len(bad) == 1
        return
    assert not bad
    shown, trained = chat.decode(ids[0]), chat.decode(labels[0])
    assert answer in trained
    assert question in shown
    assert question not in trained
    for name, text in (("label", label), ("system", system), ("context", context)):
        if text and text is not True:
            assert str(text) in shown or counts[f"{UNUSED}{name}"] == 1
