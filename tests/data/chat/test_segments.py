"""Segments: nothing is cut but at control tokens."""

import itertools
import os
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jllm.data.chat.builtin_templates import TEMPLATES
from jllm.data.chat.marks import CLOSE, END, OPEN, START, StandIns, control_pattern
from jllm.data.chat.records.conversation import BadRecordError
from jllm.data.chat.segments import Markup, Segment, SegmentBuilder, drop_spans, flatten, inverted
from jllm.data.tokenizer.checked_engine import CheckedEngine
from jllm.data.tokenizer.facts import TokenizerFacts
from tests.data.chats import PLAIN, Chat, assistant, user

EXAMPLES = 25 * int(os.environ.get("JLLM_TEST_SIZE", "1"))


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
    assert bool(bad) == (not all(said.strip() for _, said in turns)), bad
    if bad:
        return
    controls = re.findall("|".join(re.escape(token["content"]) for token in facts.added), "".join(sum(turns, ())))
    if not controls:
        assert ids[0] == chat.reference.encode(whole, add_special_tokens=False).ids
    answers = "".join(said + "<|im_end|>" for _, said in turns)
    decoded = chat.decode(labels[0])
    if re.sub(r"\s", "", whole).isascii():
        assert re.sub(r"\s", "", decoded) == re.sub(r"\s", "", answers)


CONTROLS = [{"content": f"<{name}>", "id": number, "special": True} for number, name in enumerate("abc")]
stretches = st.lists(st.sampled_from(["<a>", "<b>", "<c>", "é", "x ", "<", START, END, OPEN, CLOSE]), max_size=20)


@settings(max_examples=4 * EXAMPLES, deadline=None)
@given(stretches=stretches, everything=st.booleans(), marked=st.booleans())
def test_segments_are_the_text_without_its_marks(stretches: list[str], everything: bool, marked: bool) -> None:
    """Whatever marks stand where: nothing is lost, cuts are at control tokens only, spans lie in their texts."""
    rendered = "".join(stretches)
    markup = Markup(
        ids={token["content"]: token["id"] for token in CONTROLS},
        control=control_pattern(CONTROLS),
        marked=marked,
        ends_of_turn=frozenset([2]),
    )
    segments = SegmentBuilder(markup, StandIns(), everything).build(rendered)
    names = [token["content"] for token in CONTROLS]
    joined = "".join(segment.text if segment.control < 0 else names[segment.control] for segment in segments)
    assert joined == re.sub("[\ue000-\ue005]", "", rendered)
    for one, other in itertools.pairwise(segments):
        assert one.control >= 0 or other.control >= 0, "two texts side by side"
    for segment in segments:
        assert not (segment.control < 0 and markup.control.search(segment.text))
        for start, end in segment.spans:
            assert 0 <= start < end <= len(segment.text)
    if everything:
        assert all(segment.trained or segment.spans == [(0, len(segment.text))] for segment in segments)


def test_flat_spans_are_bytes() -> None:
    flat = flatten([Segment(control=4, trained=True), Segment(text="é日x", spans=[(1, 2), (2, 3)]), Segment(control=5)])
    assert flat.texts == ["é日x"]
    assert flat.controls.tolist() == [4, -1, 5]
    assert list(flat.trained) == [1, 0, 0]
    assert flat.spans == [(0, 2, 5), (0, 5, 6)]


def test_answers_that_do_not_count_are_taken_back() -> None:
    first, second = Segment(text="one", spans=[(0, 3)]), Segment(text="two", spans=[(0, 3)])
    end = Segment(control=1, trained=True)
    marked: list[list[tuple[Segment, tuple[int, int] | None]]] = [[(first, (0, 3)), (end, None)], [(second, (0, 3))]]
    with pytest.raises(BadRecordError, match="marks 2 parts, the record has 1 answers"):
        drop_spans(marked, [True])
    drop_spans(marked, [False, True])
    assert (first.spans, end.trained, second.spans) == ([], False, [(0, 3)])


@given(
    cuts=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)).map(lambda pair: (min(pair), max(pair))), max_size=4)
)
def test_inverted_is_all_that_was_not(cuts: list[tuple[int, int]]) -> None:
    cuts = [(start, end) for start, end in cuts if start < end]
    segments = [Segment(text="0123456789"[:9], spans=list(cuts)), Segment(control=1, trained=True), Segment(control=2)]
    taken = {at for start, end in cuts for at in range(start, end)}
    inverted(segments)
    assert sorted(at for start, end in segments[0].spans for at in range(start, end)) == sorted({*range(9)} - taken)
    assert [segment.trained for segment in segments[1:]] == [False, True]
