"""Conversations to segments: what is encoded, and what is trained on."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from jllm.data.chat.builtin_templates import TEMPLATES
from jllm.data.chat.rendering import Renderer
from jllm.data.prepare.recipes import template_warnings
from jllm.data.tokenizer.checked_engine import CheckedEngine, open_engine
from jllm.data.tokenizer.facts import TokenizerFacts, load_tokenizer
from tests.data.chats import CONVERSATIONS, END_OUTSIDE, PLAIN, THINKING, Chat, assistant, chat_of, user
from tests.data.tokenizers_for_tests import asset_tokenizer


@pytest.mark.parametrize("short_cut", [True, False])
def test_trained_is_answers_and_their_ends(facts: TokenizerFacts, engine: CheckedEngine, short_cut: bool) -> None:
    chat = Chat(facts, engine, PLAIN, short_cut=short_cut)
    for messages in CONVERSATIONS[:2]:
        answers = [message["content"] + "<|im_end|>" for message in messages if message["role"] == "assistant"]
        assert chat.trained(messages) == "".join(answers)


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
def test_an_answer_that_says_nothing_is_bad(facts: TokenizerFacts, engine: CheckedEngine, template: str) -> None:
    chat = Chat(facts, engine, template)
    for messages in (
        [user("q"), assistant("")],
        [user("q"), assistant(" \n"), user("r"), assistant("one")],
        [user("q"), assistant("one"), user("r"), {"role": "assistant", "content": None}],
    ):
        _, _, [bad] = chat.encode([{"messages": messages}])
        assert bad.kind == "empty answer"


def test_what_is_trained_on(facts: TokenizerFacts, engine: CheckedEngine) -> None:
    messages = [user("a"), assistant("one"), user("b"), assistant("two")]
    for template in (PLAIN, TEMPLATES["chatml"]):
        assert Chat(facts, engine, template, train_on="last").trained(messages) == "two<|im_end|>"
        flagged = [user("a"), assistant("one", weight=0), user("b"), assistant("two", train=True)]
        assert Chat(facts, engine, template).trained(flagged) == "two<|im_end|>"
        whole = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
        assert Chat(facts, engine, template, train_on_prompt=True).trained(messages) == whole


def test_completion(facts: TokenizerFacts, engine: CheckedEngine) -> None:
    chat = Chat(facts, engine, PLAIN)
    ids, labels, _ = chat.encode([{"prompt": "one two", "completion": "three"}], "completion")
    assert chat.decode(ids[0]) == "one two\nthree<|im_end|>"
    assert chat.decode(labels[0]) == "\nthree<|im_end|>"


def test_an_end_of_turn_outside_of_the_marks_is_noticed(facts: TokenizerFacts, engine: CheckedEngine) -> None:
    plan = Chat(facts, engine, END_OUTSIDE).plan
    (warning,) = template_warnings(plan)
    assert "<|im_end|>" in warning
    assert template_warnings(dataclasses.replace(plan, train_on_prompt=True)) == []
    spaced = END_OUTSIDE.replace("{%- endgeneration %}{{-", "{%- endgeneration %}{{- ' ' }}{{-")
    assert len(template_warnings(dataclasses.replace(plan, template=spaced))) == 1
    for template in (*TEMPLATES.values(), PLAIN, THINKING):
        assert template_warnings(dataclasses.replace(plan, template=template)) == []


@pytest.mark.parametrize("before", ["", " ", "\n"])
def test_a_template_without_an_end_of_turn_is_noticed(
    facts: TokenizerFacts, engine: CheckedEngine, before: str
) -> None:
    """With marks and without; where everything is trained on, too."""
    endless = "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"
    shown = "{{- message.content }}{{- '" + before.replace("\n", "\\n") + "' }}"
    marked = (
        "{%- if message.role == 'assistant' %}{%- generation %}" + shown + "{%- endgeneration %}{%- else %}" + shown
    )
    for template in (endless + shown + "{%- endfor %}", endless + marked + "{%- endif %}{%- endfor %}"):
        for everything in (False, True):
            plan = Chat(facts, engine, template, train_on_prompt=everything).plan
            (warning,) = template_warnings(plan)
            assert "nothing that ends a turn" in warning
    both = Chat(facts, engine, PLAIN, tools_template=endless + shown + "{%- endfor %}").plan
    assert len(template_warnings(both)) == 1


def test_conversations_with_tools_have_their_own_template(facts: TokenizerFacts, engine: CheckedEngine) -> None:
    chat = Chat(facts, engine, PLAIN, tools_template="{{- tools | tojson }}" + PLAIN)
    tools = [{"type": "function", "function": {"name": "name_of_tool"}}]
    messages = [user("a"), assistant("b")]
    ids, labels, bad = chat.encode([{"messages": messages, "tools": tools}, {"messages": messages}])
    assert not bad
    assert [chat.decode(row).split("<|im_start|>")[0] for row in ids] == [json.dumps(tools), ""]
    assert [chat.decode(row) for row in labels] == ["b<|im_end|>"] * 2


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


@pytest.mark.parametrize("name", ["PLAIN", "chatml", "real"])
def test_white_space_at_the_edges_of_an_answer_belongs_to_it(
    name: str, facts: TokenizerFacts, engine: CheckedEngine
) -> None:
    """Where the template keeps it: qwen3's opens the last answer in another way than those before."""
    if name == "real":
        facts = load_tokenizer(str(asset_tokenizer("qwen3")))
        engine = open_engine(facts, inert=True)
    template = {"PLAIN": PLAIN, "chatml": TEMPLATES["chatml"], "real": facts.chat_template}[name]
    assert template is not None
    chat = Chat(facts, engine, template)
    for text in ("  leading", "trailing \n", "\tboth\n\n", " ", "x"):
        messages = [user("q"), assistant(f"{text}a{text}"), user("r"), assistant(f"{text}b{text}")]
        shown = [f"{text}a{text}<|im_end|>", f"{text}b{text}<|im_end|>"]
        assert chat.trained(messages) == "".join(shown)


def test_white_space_where_only_some_of_it_is_kept() -> None:
    facts = load_tokenizer(str(asset_tokenizer("qwen3")))
    assert facts.chat_template is not None
    chat = Chat(facts, open_engine(facts, inert=True), facts.chat_template)
    assert chat.trained([user("q"), assistant("\n  b ")]) == "  b <|im_end|>", "qwen3's takes line ends from the front"


def test_white_space_between_words_of_a_template(facts: TokenizerFacts, engine: CheckedEngine) -> None:
    """No control token is near that could say where an answer begins and ends."""
    template = (
        "{%- for message in messages %}{{- '[' + message.role + ']' + message.content + ' (end)\\n' }}{%- endfor %}"
    )
    chat = Chat(facts, engine, template)
    assert chat.trained([user("q"), assistant("  a\n"), user("r"), assistant("\tb ")]) == "  a\n\tb "


@pytest.mark.parametrize("template", [PLAIN, TEMPLATES["chatml"]], ids=["plain", "marked"])
def test_a_flag_beats_training_on_everything(facts: TokenizerFacts, engine: CheckedEngine, template: str) -> None:
    chat = Chat(facts, engine, template, train_on_prompt=True)
    messages = [user("a"), assistant("one", train=False), {**user("b"), "masked": 1}, assistant("two")]
    trained = chat.trained(messages)
    assert trained.count("<|im_start|>") == 4
    assert [text in trained for text in ("user\na", "one", "b<", "two<|im_end|>")] == [True, False, False, True]


def test_developers_are_the_system_where_the_template_knows_none(facts: TokenizerFacts, engine: CheckedEngine) -> None:
    messages = [{"role": "developer", "content": "Be terse."}, user("a"), assistant("b")]
    named = "{%- for message in messages if message.role in ('system', 'user', 'assistant') %}"
    for template, role in ((PLAIN, "developer"), (named + PLAIN.split("%}", 1)[1], "system")):
        ids, _, bad = Chat(facts, engine, template).encode([{"messages": messages}])
        assert not bad
        assert f"<|im_start|>{role}\nBe terse.<|im_end|>" in Chat(facts, engine, template).decode(ids[0])


@pytest.mark.parametrize("template", [PLAIN, TEMPLATES["chatml"]], ids=["plain", "marked"])
def test_a_flag_trains_what_is_no_answer(tmp_path: Path, template: str) -> None:
    """With its end of turn, in templates with marks of their own and in others; nothing else is trained on for it."""
    chat = chat_of(tmp_path, template)
    end = chat.trained([user("q"), assistant("a")]).removeprefix("a")
    asked = [user("why") | {"train": True}, assistant("so"), user("what now") | {"train": True}]
    assert chat.trained(asked) == f"why{end}so{end}what now{end}"
    beside = [{"role": "system", "content": "rule", "loss": 1}, user("why"), assistant("so", train=False)]
    assert chat.trained(beside) == f"rule{end}"
    both = [{"user": "why", "assistant": "so", "train": True}]
    assert chat.trained(both) == f"so{end}"
    last = Chat(chat.facts, chat.encoder.assembler.engine, template, train_on="last")
    assert last.trained(asked) == f"so{end}"


def test_an_empty_think_block_before_a_call_is_masked() -> None:
    """A template opens the last answer with one; it is none of the answer's, with a text or without."""
    facts = load_tokenizer(str(asset_tokenizer("qwen3")))
    chat = Chat(facts, open_engine(facts, inert=True), facts.chat_template or "")
    call = {"function": {"name": "f", "arguments": {"x": 1}}}
    shown = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call><|im_end|>'
    earlier = [user("q"), assistant("", tool_calls=[call]), user("r")]
    assert chat.trained(earlier[:2]) == shown
    assert chat.trained([*earlier, assistant("", tool_calls=[call, call])]) == shown + shown.replace(
        "<|im_end|>", "\n" + shown
    )
    thought = assistant("", tool_calls=[call], reasoning_content="hm")
    assert chat.trained([user("q"), thought]) == f"<think>\nhm\n</think>\n\n{shown}"
