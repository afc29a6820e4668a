"""A rendered conversation in segments: control tokens, and the text between them; and what of them is trained on.

Guarantees: nothing is cut but at control tokens, so the ids are those of the whole text tokenized once.
Cost: one pass over the text.
"""

import array
import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from jllm.data.chat.marks import CALL, CLOSE, END, MARKS, OPEN, REASONING, START, StandIns
from jllm.data.chat.records.conversation import BadRecordError

_TEXT, _TOKEN, _MARK = 0, 1, 2
_CLOSING = (END, CLOSE)


@dataclasses.dataclass(slots=True)
class Segment:
    """A stretch of a conversation: a control token (`control` ≥ 0), or text that has no control token in it.

    `spans` say what of a text is trained on, in characters.
    """

    text: str = ""
    control: int = -1
    trained: bool = False
    spans: list[tuple[int, int]] = dataclasses.field(default_factory=list)


class FlatSegments(NamedTuple):
    """A conversation's segments as they are handed on.

    Attributes:
        texts: its texts.
        controls: for each segment a control token's id, or -1 for the next text; int32.
        trained: for each segment, whether it is a control token that is trained on: a byte, 0 or 1.
        spans: what of the texts is trained on: number of the text, first byte, end byte.
    """

    texts: list[str]
    controls: "array.array[int]"
    trained: bytearray
    spans: list[tuple[int, int, int]]


def flatten(segments: Iterable[Segment]) -> FlatSegments:
    """Segments as they are handed on."""
    flat = FlatSegments([], array.array("i"), bytearray(), [])
    for segment in segments:
        flat.controls.append(segment.control)
        flat.trained.append(segment.trained)
        if segment.control < 0:
            text = segment.text
            for start, end in segment.spans:
                if not text.isascii():
                    start, end = len(text[:start].encode()), len(text[:end].encode())
                flat.spans.append((len(flat.texts), start, end))
            flat.texts.append(text)
    return flat


@dataclasses.dataclass(kw_only=True)
class Markup:
    """What is known about the texts that a template makes.

    Attributes:
        ids: of the tokenizer's added tokens.
        control: finds these tokens, and marks.
        marked: the template marks itself what is trained on.
        ends_of_turn: the tokens that end an answer, in a template without marks of its own; the last answer may have
            another one than those before.
        header: what opens an answer there: the last control token in it, and the text behind that.
        headers: the same of all answers that were looked at: the last one may be opened in another way.
    """

    ids: dict[str, int]
    control: "re.Pattern[str]"
    marked: bool
    ends_of_turn: frozenset[int] = frozenset()
    header: tuple[int | None, str] = (None, "")
    headers: tuple[tuple[int | None, str], ...] = ()

    def id_of(self, found: str) -> int:
        """The id of a token as `control` finds it, with the white space that it may have swallowed."""
        index = self.ids.get(found)
        return self.ids[found.strip()] if index is None else index


class SegmentBuilder:
    """Cuts one rendered text into segments and follows the marks in it."""

    def __init__(self, markup: Markup, stand_ins: StandIns, everything: bool) -> None:
        self.markup = markup
        self.stand_ins = stand_ins.used
        self.everything = everything
        self.marked: list[list[tuple[Segment, tuple[int, int] | None]]] = []

    def build(self, rendered: str) -> list[Segment]:
        ends_of_turn, stand_ins, everything = self.markup.ends_of_turn, self.stand_ins, self.everything
        segments: list[Segment] = []
        text = Segment()
        texts: list[str] = []
        length = 0  # of the text segment so far
        since = 0 if everything else -1  # where in it training began; -1: not training
        ending = -1  # where in it an answer ended whose end of turn is yet to come
        group: list[tuple[Segment, tuple[int, int] | None]] = []

        def close_span(end: int) -> None:
            if 0 <= since < end:
                text.spans.append((since, end))
                group.append((text, (since, end)))

        for found, kind in self._events(rendered):
            if kind == _TEXT:
                texts.append(found)
                length += len(found)
            elif kind == _TOKEN:
                index = self.markup.id_of(found)
                final, ended = False, ending >= 0
                if ended:
                    blank = not "".join(texts)[ending - length :].strip() if ending < length else True
                    final = index in ends_of_turn and blank
                    close_span(length if final else ending)
                    since, ending = (-1, -1)
                else:
                    close_span(length)
                    # A turn with tool calls, or cut by its template, goes on to the end of the turn.
                    final = since >= 0 and not everything and not self.markup.marked and index in ends_of_turn
                trained = since >= 0 or final or everything
                if final:
                    since = -1
                if texts:
                    text.text = "".join(texts)
                    segments.append(text)
                segment = Segment(control=index, trained=trained)
                if trained:
                    group.append((segment, None))
                group = [] if ended else group  # of what the template's own marks do not stand around
                segments.append(segment)
                text, texts, length = Segment(), [], 0
                since = 0 if since >= 0 else -1
            elif found in stand_ins:
                texts.append(stand_ins[found])
                length += len(stand_ins[found])
            elif everything:
                continue
            elif found == START:
                if ending >= 0:  # another message in the same turn: what stands between the two is of neither
                    close_span(ending)
                    since, ending = -1, -1
                since = self._answer_start(segments, "".join(texts), length) if since < 0 else since
            elif found == OPEN:
                since = length if since < 0 else since
            elif found == END:
                ending = length
                if not ends_of_turn:
                    close_span(length)
                    since, ending, group = -1, -1, []
            elif found == CLOSE:
                close_span(length)
                since = -1
                self.marked.append(group)
                group = []
            elif found == REASONING and since < 0:
                since = self._back_over_think(segments, "".join(texts), length)
            elif found == CALL and since < 0:
                since = self._back_to_header(segments, "".join(texts), length)
        close_span(ending if ending >= 0 else length)
        if texts:
            text.text = "".join(texts)
            segments.append(text)
        return segments

    def _events(self, rendered: str) -> Iterator[tuple[str, int]]:
        """Texts, control tokens, stand-ins and marks in order.

        Tokens are found in the text without its marks, as the tokenizer sees it. A mark that stands inside a token (in
        white space that the token swallows) is moved out of it, so that the token counts as trained where some of it
        does.
        """
        between = MARKS.split(rendered)
        bare = "".join(between)
        marks = list(zip(itertools.accumulate(map(len, between)), MARKS.findall(rendered), strict=False))
        at = following = 0
        for match in self.markup.control.finditer(bare):
            begin, end = match.span()
            while following < len(marks):
                place, mark = marks[following]
                if place > begin and not (place < end and mark not in _CLOSING):
                    break
                if begin > at and place > at:
                    yield bare[at : min(place, begin)], _TEXT
                    at = min(place, begin)
                yield mark, _MARK
                following += 1
            if begin > at:
                yield bare[at:begin], _TEXT
            found = match.group()
            yield found, _MARK if len(found) == 1 and "\ue000" <= found <= "\uf8ff" else _TOKEN
            at = end
            while following < len(marks) and marks[following][0] <= end and marks[following][1] in _CLOSING:
                yield marks[following][1], _MARK
                following += 1
        for place, mark in marks[following:]:
            if place > at:
                yield bare[at:place], _TEXT
                at = place
            yield mark, _MARK
        if at < len(bare):
            yield bare[at:], _TEXT

    def _answer_start(self, segments: list[Segment], text: str, length: int) -> int:
        """Training begins with the answer's own white space, which stands between the header of its turn and what the
        mark was put before."""
        here = segments[-1].control if segments else None
        for control, tail in self.markup.headers:
            if here == control and text.startswith(tail) and text[len(tail) :].isspace():
                return len(tail)
        return length

    def _back_over_think(self, segments: list[Segment], text: str, length: int) -> int:
        """Training begins with the tag that opens the reasoning, which the template has just written."""
        if not text.strip() and segments and segments[-1].control == self.markup.ids.get("<think>", -2):
            segments[-1].trained = True
            return 0
        found = re.search(r"<think>\s*$", text)
        return found.start() if found else length

    def _back_to_header(self, segments: list[Segment], text: str, length: int) -> int:
        """Training begins behind the header of the turn: a turn that is tool calls only has no other mark. An empty
        think block that the template opens the last answer with is of its header."""
        control, tail = self.markup.header
        if control is None:
            ends = [text.rfind(end) + len(end) for _, end in self.markup.headers if end in text]
            return max(ends, default=length)
        position = len(segments) - 1
        while position >= 0 and segments[position].control != control:
            position -= 1
        if position < 0:
            return length
        texts = [segment.text for segment in segments] + [text]
        for other, end in self.markup.headers:
            for index in range(len(segments) - 1, position, -1):
                if segments[index].control == other and texts[index + 1].startswith(end):
                    position, tail = index, end
                    break
        for index in range(position + 1, len(segments)):
            segment = segments[index]
            if segment.control >= 0:
                segment.trained = True
            else:
                segment.spans = [(len(tail) if index == position + 1 else 0, len(segment.text))]
        return len(tail) if position == len(segments) - 1 else 0


def drop_spans(marked: list[list[tuple[Segment, tuple[int, int] | None]]], answers: list[bool]) -> None:
    """Take back the training of the answers that do not count, in a template that marks answers itself.

    Raises:
        BadRecordError: the template marks more or fewer stretches than there are answers.
    """
    if len(marked) != len(answers):
        raise BadRecordError(
            "template error", f"the template marks {len(marked)} parts, the record has {len(answers)} answers"
        )
    for group, counts in zip(marked, answers, strict=True):
        for segment, span in group if not counts else ():
            if span is None:
                segment.trained = False
            else:
                segment.spans.remove(span)


def inverted(segments: list[Segment]) -> list[Segment]:
    """The segments with what is trained on and what is not exchanged."""
    for segment in segments:
        if segment.control >= 0:
            segment.trained = not segment.trained
            continue
        at, spans = 0, []
        for start, end in sorted(segment.spans):
            if start > at:
                spans.append((at, start))
            at = max(at, end)
        segment.spans = [*spans, (at, len(segment.text))] if at < len(segment.text) else spans
    return segments
