"""Chat: what is encoded, what is trained on, and how long conversations become rows."""

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jllm.data.chat.builtin_templates import TEMPLATES
from jllm.data.chat.formats import BadRecordError, format_of, read_conversation
from jllm.data.chat.rendering import Renderer
from jllm.data.dataset.shards import IGNORE_INDEX
from jllm.data.packing.conversations import continued_rows, joined, split_long
from jllm.data.prepare.recipes import template_warnings
from jllm.data.tokenizer.checked_engine import CheckedEngine, open_engine
from jllm.data.tokenizer.facts import TokenizerFacts, load_tokenizer
from jllm.errors import UserError
from tests.data.chats import CONVERSATIONS, END_OUTSIDE, PLAIN, THINKING, Chat, assistant, user
from tests.data.tokenizers_for_tests import asset_tokenizer

EXAMPLES = 25 * int(os.environ.get("JLLM_TEST_SIZE", "1"))


@pytest.fixture(scope="module")
def facts(byte_tokenizer: Path) -> TokenizerFacts:
    return load_tokenizer(str(byte_tokenizer))


@pytest.fixture(scope="module")
def engine(facts: TokenizerFacts) -> CheckedEngine:
    return open_engine(facts, inert=True)


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_built_in_templates_have_the_mask_of_transformers(
    name: str, byte_tokenizer: Path, facts: TokenizerFacts, engine: CheckedEngine
) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(byte_tokenizer)
    chat = Chat(facts, engine, TEMPLATES[name])
    ids, labels, bad = chat.encode([{"messages": messages} for messages in CONVERSATIONS])
    assert not bad
    template = TEMPLATES[name].replace("strftime_now('%d %b %Y')", "'31 Jan 2026'")
    for messages, given_ids, given_labels in zip(CONVERSATIONS, ids, labels, strict=True):
        wanted = tokenizer.apply_chat_template(
            messages, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
        )
        assert given_ids == wanted["input_ids"]
        assert [label != IGNORE_INDEX for label in given_labels] == [bool(m) for m in wanted["assistant_masks"]]


@pytest.mark.parametrize("short_cut", [True, False])
def test_trained_is_answers_and_their_ends(facts: TokenizerFacts, engine: CheckedEngine, short_cut: bool) -> None:
    chat = Chat(facts, engine, PLAIN, short_cut=short_cut)
    for messages in CONVERSATIONS[:2]:
        answers = [message["content"] + "<|im_end|>" for message in messages if message["role"] == "assistant"]
        assert chat.trained(messages) == "".join(answers)


def test_control_tokens_in_data_stay_text(facts: TokenizerFacts, engine: CheckedEngine) -> None:
    chat = Chat(facts, engine, THINKING)
    control = {token["content"]: token["id"] for token in facts.added}
    text = "a <|im_end|><|im_start|>assistant\n <think> x </think> <tool_call> b"
    tools = [{"type": "function", "function": {"name": "f", "description": "<|im_end|>", "parameters": {}}}]
    ids, labels, bad = chat.encode([{"messages": [user(text), assistant("ok <|im_end|> done")], "tools": tools}])
    assert not bad
    assert chat.decode(ids[0]).count("<|im_end|>") == 4
    assert ids[0].count(control["<|im_end|>"]) == 2
    assert ids[0].count(control["<|im_start|>"]) == 2
    assert ids[0].count(control["<think>"]) == 1
    assert ids[0].count(control["<tool_call>"]) == 0
    assert chat.decode(labels[0]) == "ok <|im_end|> done<|im_end|>"


def test_thinking(facts: TokenizerFacts, engine: CheckedEngine) -> None:
    chat = Chat(facts, engine, THINKING)
    control = {token["content"]: token["id"] for token in facts.added}
    assert chat.trained([user("a"), assistant("b")]) == "b<|im_end|>", "an empty block of the template is masked"
    thought = "<think>\nhmm\n</think>\n\nyes"
    assert chat.trained([user("a"), assistant(thought)]) == f"{thought}<|im_end|>"
    assert chat.trained([user("a"), assistant(thought), user("b"), assistant("c")]) == "yes<|im_end|>c<|im_end|>"
    ids, _, _ = chat.encode([{"messages": [user("a"), assistant(thought)]}])
    assert ids[0].count(control["</think>"]) == 1


@pytest.mark.parametrize("template", [PLAIN, THINKING, TEMPLATES["chatml"]], ids=["plain", "thinking", "marked"])
def test_an_answer_without_a_text_still_ends(facts: TokenizerFacts, engine: CheckedEngine, template: str) -> None:
    chat = Chat(facts, engine, template)
    assert chat.trained([user("q"), assistant("")]) == "<|im_end|>"
    assert chat.trained([user("q"), assistant(""), user("r"), assistant("one")]) == "<|im_end|>one<|im_end|>"
    assert chat.trained([user("q"), assistant("one"), user("r"), assistant("")]) == "one<|im_end|><|im_end|>"


def test_tool_calls_are_trained(facts: TokenizerFacts, engine: CheckedEngine) -> None:
    chat = Chat(facts, engine, THINKING)
    call = {"function": {"name": "f", "arguments": '{"x": 1}'}}
    said = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call><|im_end|>'
    messages = [user("a"), assistant("", tool_calls=[call]), {"role": "tool", "content": "7"}, assistant("It is 7.")]
    assert chat.trained(messages) == said + "It is 7.<|im_end|>"
    said = chat.trained([user("a"), assistant("Look: ", tool_calls=[call]), user("b"), assistant("c")])
    assert said.startswith("Look:")


def test_what_is_trained_on(facts: TokenizerFacts, engine: CheckedEngine) -> None:
    messages = [user("a"), assistant("one"), user("b"), assistant("two")]
    for template in (PLAIN, TEMPLATES["chatml"]):
        assert Chat(facts, engine, template, train_on="last").trained(messages) == "two<|im_end|>"
        flagged = [user("a"), assistant("one", weight=0), user("b"), assistant("two", train=True)]
        assert Chat(facts, engine, template).trained(flagged) == "two<|im_end|>"
        whole = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
        assert Chat(facts, engine, template, train_on_prompt=True).trained(messages) == whole


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
    chat = Chat(facts, engine, PLAIN)
    given = [{"system": "s"}, {"assistant": "early"}, {"user": "a"}, {"user": "b"}, {"assistant": "c"}, {"user": "d"}]
    merged = [{"system": "s"}, {"user": "ab"}, {"assistant": "c"}]
    assert chat.encode([given], "roles")[:2] == chat.encode([merged], "roles")[:2]


def test_completion(facts: TokenizerFacts, engine: CheckedEngine) -> None:
    chat = Chat(facts, engine, PLAIN)
    ids, labels, _ = chat.encode([{"prompt": "one two", "completion": "three"}], "completion")
    assert chat.decode(ids[0]) == "one two\nthree<|im_end|>"
    assert chat.decode(labels[0]) == "\nthree<|im_end|>"


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        ({"messages": [user("a")]}, "no answer"),
        ({"messages": "x"}, "wrong type"),
        ({}, "missing field"),
        ({"messages": [user("a"), assistant("b", weight=0)]}, "no answer"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}, assistant("b")]}, "wrong type"),
    ],
)
def test_bad_records_are_named(record: Any, kind: str, facts: TokenizerFacts, engine: CheckedEngine) -> None:
    good = {"messages": [user("a"), assistant("b")]}
    chat = Chat(facts, engine, PLAIN)
    ids, _, bad = chat.encode([good, record, good])
    assert len(ids) == 2
    assert [(item.kind, item.line) for item in bad] == [(kind, 2)]


def test_an_end_of_turn_outside_of_the_marks_is_noticed(facts: TokenizerFacts, engine: CheckedEngine) -> None:
    plan = Chat(facts, engine, END_OUTSIDE).plan
    (warning,) = template_warnings(plan)
    assert "<|im_end|>" in warning
    assert template_warnings(dataclasses.replace(plan, train_on_prompt=True)) == []
    spaced = END_OUTSIDE.replace("{%- endgeneration %}{{-", "{%- endgeneration %}{{- ' ' }}{{-")
    assert len(template_warnings(dataclasses.replace(plan, template=spaced))) == 1
    for template in (*TEMPLATES.values(), PLAIN, THINKING):
        assert template_warnings(dataclasses.replace(plan, template=template)) == []


def test_template_errors(facts: TokenizerFacts, engine: CheckedEngine) -> None:
    refusing = "{%- if messages|length == 2 %}{{- raise_exception('two only') }}{%- endif %}" + PLAIN
    _, _, bad = Chat(facts, engine, refusing).encode([{"messages": [user("a"), assistant("b")]}])
    assert "two only" in bad[0].detail
    with pytest.raises(UserError, match="not a valid template"):
        Chat(facts, engine, "{% if %}").encode([{"messages": [user("a"), assistant("b")]}])
    with pytest.raises(BadRecordError):
        read_conversation({"messages": [{"role": 3}]}, "messages", {})


texts = st.lists(
    st.one_of(st.characters(codec="utf-8"), st.sampled_from(["<think>", "<|im_end|>", "\n", " ", "a", "</think>"])),
    min_size=1,
    max_size=40,
).map("".join)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(turns=st.lists(st.tuples(texts, texts), min_size=1, max_size=4), marked=st.booleans())
def test_any_conversation_is_whole_text_tokenized_once(
    turns: list[tuple[str, str]], marked: bool, facts: TokenizerFacts, engine: CheckedEngine
) -> None:
    """Where no control token stands in the data, ids are those of the rendered text; always, trained is the answers."""
    chat = Chat(facts, engine, TEMPLATES["chatml"] if marked else PLAIN)
    messages = [message for asked, said in turns for message in (user(asked), assistant(said))]
    ids, labels, bad = chat.encode([{"messages": messages}])
    whole = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    if bad:
        assert not any(said.strip() for _, said in turns)
        return
    controls = re.findall("|".join(re.escape(token["content"]) for token in facts.added), "".join(sum(turns, ())))
    if not controls:
        assert ids[0] == chat.reference.encode(whole, add_special_tokens=False).ids
    answers = "".join(said + "<|im_end|>" for _, said in turns)
    decoded = chat.decode(labels[0])
    if re.sub(r"\s", "", whole).isascii():
        assert re.sub(r"\s", "", decoded) in (
            re.sub(r"\s", "", answers),
            re.sub(r"\s", "", "".join(said + "<|im_end|>" for _, said in turns if said.strip())),
        )


@settings(max_examples=4 * EXAMPLES, deadline=None)
@given(
    turns=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 60)), min_size=1, max_size=8),
    length=st.integers(2, 50),
)
def test_long_conversations_train_each_answer_token_once(turns: list[tuple[int, int]], length: int) -> None:
    trained = np.concatenate([np.r_[np.zeros(asked, bool), np.ones(said, bool)] for asked, said in turns])
    ids = np.arange(len(trained), dtype=np.int32)
    labels = np.where(trained, ids, np.int32(IGNORE_INDEX))
    rows = split_long(joined([ids], [labels]), length)
    assert rows.labels is not None
    assert rows.lengths.max() <= length
    seen = rows.labels[rows.labels != IGNORE_INDEX]
    assert np.array_equal(np.sort(seen), np.flatnonzero(trained))
    firsts = rows.offsets[:-1]
    assert np.all(rows.labels[firsts] == IGNORE_INDEX), "a row's first token has nothing to be predicted from"
    for begin, end, trainable in continued_rows(labels, length)[1:] if len(ids) > length else ():
        first = int(np.flatnonzero(trained[trainable:end])[0]) + trainable
        assert first - begin == min(first, max(1, length // 2))


@pytest.mark.parametrize("form", ["qwen3", "llama-2"])
def test_real_tokenizers(form: str) -> None:
    folder = asset_tokenizer("qwen3" if form == "qwen3" else "llama2")
    facts = load_tokenizer(str(folder))
    engine = open_engine(facts, inert=True)
    template = facts.chat_template if form == "qwen3" else TEMPLATES[form]
    assert template is not None
    chat = Chat(facts, engine, template)
    for messages in CONVERSATIONS:
        ids, labels, bad = chat.encode([{"messages": messages}])
        assert not bad
        whole = re.sub("[\ue000-\ue005]", "", Renderer(chat.plan).render(messages, None))
        assert ids[0] == chat.reference.encode(whole, add_special_tokens=False).ids
        decoded = chat.decode(labels[0])
        for message in messages:
            if message["role"] == "assistant" and message["content"].isascii():
                assert message["content"].strip() in decoded
