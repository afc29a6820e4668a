"""Skeletons: filled with texts they are the segments of the conversation with these texts."""

import os

from hypothesis import given, settings
from hypothesis import strategies as st

from jllm.data.chat.marks import FIRST_STAND_IN
from jllm.data.chat.segments import Segment, flatten
from jllm.data.chat.skeleton import skeleton_of

EXAMPLES = 100 * int(os.environ.get("JLLM_TEST_SIZE", "1"))
own = st.text("ab é\n", max_size=4)
messages = st.lists(
    st.text(st.characters(codec="utf-8", exclude_categories=["Co"]), max_size=6), min_size=3, max_size=3
)
texts_with_gaps = st.tuples(own, st.lists(st.tuples(st.integers(0, 2), own), max_size=3))


def gap(number: int) -> str:
    return f"a{chr(FIRST_STAND_IN + number)}a"


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    items=st.lists(st.tuples(texts_with_gaps, st.booleans(), st.integers(0, 3), st.integers(0, 3)), max_size=5),
    messages=messages,
)
def test_filled_gaps_are_the_conversation(
    items: list[tuple[tuple[str, list[tuple[int, str]]], bool, int, int]], messages: list[str]
) -> None:
    """Spans may begin and end before and behind any of the gaps."""
    with_gaps: list[Segment] = []
    wanted: list[Segment] = []
    for number, ((before, rest), trained, first, last) in enumerate(items):
        control = Segment(control=number, trained=trained)
        with_gaps.append(control)
        wanted.append(control)
        for segments, shown in ((with_gaps, gap), (wanted, messages.__getitem__)):
            text, ends = before, [len(before)]
            for message, behind in rest:
                text += shown(message)
                ends.append(len(text))
                text += behind
            start, end = sorted((ends[first % len(ends)], ends[last % len(ends)]))
            segments.append(Segment(text=text, spans=[(start, end)] if start < end else []))
    for i in range(1, len(with_gaps), 2):  # a message without a text leaves nothing to train on
        if with_gaps[i].spans and not wanted[i].spans:
            with_gaps[i].spans = []
    assert skeleton_of(with_gaps).filled(messages) == flatten(wanted)
