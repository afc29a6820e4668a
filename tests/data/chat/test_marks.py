"""Control tokens of the data, and marks, on their way through a template."""

import os
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jllm.data.chat.marks import (
    CALL,
    END,
    FIRST_STAND_IN,
    LAST_STAND_IN,
    MARKS,
    REASONING,
    START,
    StandIns,
    control_pattern,
    mapped,
    token_pattern,
    with_marks,
)
from jllm.data.chat.records.conversation import BadRecordError
from jllm.data.tokenizer.checked_engine import CheckedEngine
from jllm.data.tokenizer.facts import TokenizerFacts
from tests.data.chats import THINKING, Chat, assistant, user


def test_control_tokens_in_data_stay_text(facts: TokenizerFacts, engine: CheckedEngine) -> None:
    chat = Chat(facts, engine, "{%- if tools %}{{- tools | tojson }}{%- endif %}" + THINKING)
    control = {token["content"]: token["id"] for token in facts.added}
    text = "a <|im_end|><|im_start|>assistant\n <think> x </think> <tool_call> b"
    tools = [{"type": "function", "function": {"name": "f", "description": "<|im_end|>", "parameters": {}}}]
    ids, labels, bad = chat.encode([{"messages": [user(text), assistant("ok <|im_end|> done")], "tools": tools}])
    assert not bad
    assert chat.decode(ids[0]).count("<|im_end|>") == 5
    assert ids[0].count(control["<|im_end|>"]) == 2
    assert ids[0].count(control["<|im_start|>"]) == 2
    assert ids[0].count(control["<think>"]) == 1
    assert ids[0].count(control["<tool_call>"]) == 0
    assert chat.decode(labels[0]) == "ok <|im_end|> done<|im_end|>"


EXAMPLES = 100 * int(os.environ.get("JLLM_TEST_SIZE", "1"))
TOKENS = ["<|a|>", "<|ab|>", "<think>", "[X]", "x*", "[X]a", "<|a|>x"]
texts = st.lists(st.sampled_from([*TOKENS, "<", "|", " ", "a", "é", "\n", "x"]), max_size=15).map("".join)


@settings(max_examples=EXAMPLES, deadline=None)
@given(given_=st.lists(texts, max_size=4))
def test_hidden_tokens_come_back(given_: list[str]) -> None:
    stand_ins, pattern = StandIns(), token_pattern(TOKENS)
    hidden = [stand_ins.hide(text, pattern) for text in given_]
    for text in hidden:
        assert not any(token in text for token in TOKENS)
    assert [re.sub("[\ue010-\uf8ff]", lambda found: stand_ins.used[found[0]], text) for text in hidden] == given_
    assert len(set(stand_ins.used.values())) == len(stand_ins.used), "one stand-in a token"


@settings(max_examples=EXAMPLES, deadline=None)
@given(text=texts, swallows=st.booleans())
def test_tokens_are_found_as_the_naive_pattern_finds_them(text: str, swallows: bool) -> None:
    """The pattern that starts with a set of characters finds what alternatives find, the longest first."""
    added = [{"content": token, "rstrip": swallows} for token in TOKENS]
    naive = "|".join(re.escape(token) + (r"\s*" if swallows else "") for token in sorted(TOKENS, key=len, reverse=True))
    found = [(match.start(), match.group()) for match in control_pattern(added).finditer(text)]
    assert found == [(match.start(), match.group()) for match in re.finditer(naive, text)]


@pytest.mark.parametrize("where", ["lstrip", "rstrip", "single_word"])
def test_tokens_with_white_space_and_words_around(where: str) -> None:
    pattern = control_pattern([{"content": "tok", where: True}])
    found = [match.group() for match in pattern.finditer("a tok  b xtok toky tok")]
    wanted = {
        "lstrip": [" tok", "tok", " tok", " tok"],
        "rstrip": ["tok  ", "tok ", "tok", "tok"],
        "single_word": ["tok", "tok"],
    }
    assert found == wanted[where]


def test_too_many_different_tokens() -> None:
    tokens = [f"<{number}>" for number in range(LAST_STAND_IN - FIRST_STAND_IN + 2)]
    stand_ins, pattern = StandIns(), re.compile("<[0-9]+>")
    stand_ins.hide("".join(tokens[:-1]), pattern)
    with pytest.raises(BadRecordError, match="too many"):
        stand_ins.hide(tokens[-1], pattern)


@settings(max_examples=EXAMPLES, deadline=None)
@given(content=texts, reasoning=st.none() | texts, call=st.booleans())
def test_marks_stand_around_the_answer_and_change_nothing(content: str, reasoning: str | None, call: bool) -> None:
    message: dict[str, object] = {"role": "assistant", "content": content}
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    if call:
        message["tool_calls"] = [{"function": {"name": "f", "arguments": {}}}]
    marked = with_marks(message)
    assert mapped(marked, lambda text: MARKS.sub("", text)) == message
    names = [called["function"]["name"] for called in marked.get("tool_calls", [])]
    assert names == ([f"{CALL}f"] if call else [])
    shown = marked["content"]
    assert shown.count(START) == (1 if content.strip() or not call else 0)
    assert shown.count(END) == (0 if call else 1)
    if content.strip():
        assert shown.index(START) + 1 == shown.index(content.strip(), shown.index(START))


def test_reasoning_is_marked_where_the_answer_holds_it() -> None:
    marked = with_marks({"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"})["content"]
    assert marked == f"<think>\n{REASONING}hm\n</think>\n\n{START}yes{END}"
    empty = with_marks({"role": "assistant", "content": "<think>\n\n</think>\n\nyes"})["content"]
    assert REASONING not in empty


@given(content=st.text(st.sampled_from(" \n\tab<"), min_size=1).filter(str.strip))
def test_tight_marks_take_outer_white_space_in(content: str) -> None:
    assert with_marks(assistant(content), tight=True)["content"] == START + content + END
    loose = with_marks(assistant(content))["content"]
    assert loose.strip() == START + content.strip() + END
    assert MARKS.sub("", loose) == content
