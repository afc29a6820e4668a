"""A rendered conversation cut into what is encoded: control tokens, and text between them, with their trained parts.

Guarantees: nothing is cut but at control tokens, so the ids are those of the whole text tokenized once.
Cost: one pass over the text.
"""

import array
import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from jllm.data.chat.formats import BadRecordError
from jllm.data.chat.marks import CALL, CLOSE, END, MARKS, OPEN, REASONING, START, StandIns

_TEXT, _TOKEN, _MARK = 0, 1, 2
_CLOSING = (END, CLOSE)


@dataclasses.dataclass(slots=True)
class Piece:
    """A stretch of a conversation: a control token (`control` ≥ 0), or text that has no control token in it.

    `spans` are the trained parts of a text, in characters.
    """

    text: str = ""
    control: int = -1
    trained: bool = False
    spans: list[tuple[int, int]] = dataclasses.field(default_factory=list)


class Flat(NamedTuple):
    """A conversation's pieces as they are handed on.

    Attributes:
        texts: its texts.
        controls: for each piece a control token's id, or -1 for the next text; int32.
        trained: for each piece, whether it is a control token that is trained on: a byte, 0 or 1.
        spans: trained parts of texts: number of the text, first byte, end byte.
    """

    texts: list[str]
    controls: "array.array[int]"
    trained: bytearray
    spans: list[tuple[int, int, int]]


def flatten(pieces: Iterable[Piece]) -> Flat:
    """Pieces in the form in which they are handed on."""
    flat = Flat([], array.array("i"), bytearray(), [])
    for piece in pieces:
        flat.controls.append(piece.control)
        flat.trained.append(piece.trained)
        if piece.control < 0:
            text = piece.text
            for start, end in piece.spans:
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
    """

    ids: dict[str, int]
    control: "re.Pattern[str]"
    marked: bool
    ends_of_turn: frozenset[int] = frozenset()
    header: tuple[int | None, str] = (None, "")

    def id_of(self, found: str) -> int:
        """The id of a token as `control` finds it, with the white space that it may have swallowed."""
        index = self.ids.get(found)
        return self.ids[found.strip()] if index is None else index


class Builder:
    """Cuts one rendered text into pieces and follows the marks in it."""

    def __init__(self, markup: Markup, stand_ins: StandIns, everything: bool) -> None:
        self.markup = markup
        self.stand_ins = stand_ins.used
        self.everything = everything
        self.marked: list[list[tuple[Piece, tuple[int, int] | None]]] = []

    def build(self, rendered: str) -> list[Piece]:
        ends_of_turn, stand_ins, everything = self.markup.ends_of_turn, self.stand_ins, self.everything
        pieces: list[Piece] = []
        text = Piece()
        parts: list[str] = []
        length = 0  # of the text piece so far
        since = 0 if everything else -1  # where in it training began; -1: not training
        ending = -1  # where in it an answer ended whose end of turn is yet to come
        group: list[tuple[Piece, tuple[int, int] | None]] = []

        def close_span(end: int) -> None:
            if 0 <= since < end:
                text.spans.append((since, end))
                group.append((text, (since, end)))

        for found, kind in self._events(rendered):
            if kind == _TEXT:
                parts.append(found)
                length += len(found)
            elif kind == _TOKEN:
                index = self.markup.id_of(found)
                final = False
                if ending >= 0:
                    blank = not "".join(parts)[ending - length :].strip() if ending < length else True
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
                if parts:
                    text.text = "".join(parts)
                    pieces.append(text)
                piece = Piece(control=index, trained=trained)
                if trained:
                    group.append((piece, None))
                pieces.append(piece)
                text, parts, length = Piece(), [], 0
                since = 0 if since >= 0 else -1
            elif found in stand_ins:
                parts.append(stand_ins[found])
                length += len(stand_ins[found])
            elif everything:
                continue
            elif found == START:
                since = self._answer_start(pieces, "".join(parts), length) if since < 0 else since
            elif found == OPEN:
                since = length if since < 0 else since
            elif found == END:
                ending = length
                if not ends_of_turn:
                    close_span(length)
                    since, ending = -1, -1
            elif found == CLOSE:
                close_span(length)
                since = -1
                self.marked.append(group)
                group = []
            elif found == REASONING and since < 0:
                since = self._back_over_think(pieces, "".join(parts), length)
            elif found == CALL and since < 0:
                since = self._back_to_header(pieces, "".join(parts), length, self.markup.header)
        close_span(ending if ending >= 0 else length)
        if parts:
            text.text = "".join(parts)
            pieces.append(text)
        return pieces

    def _events(self, rendered: str) -> Iterator[tuple[str, int]]:
        """Texts, control tokens, stand-ins and marks in order.

        Tokens are found in the text without its marks, as the tokenizer sees it. A mark that stands inside a token (in
        white space that the token swallows) is moved out of it, so that the token counts as trained where a part does.
        """
        pieces = MARKS.split(rendered)
        bare = "".join(pieces)
        marks = list(zip(itertools.accumulate(map(len, pieces)), MARKS.findall(rendered), strict=False))
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

    def _answer_start(self, pieces: list[Piece], text: str, length: int) -> int:
        """Training begins with the answer's own white space, which stands between the header of its turn and what the
        mark was put before."""
        control, tail = self.markup.header
        here = pieces[-1].control if pieces else None
        if here == control and text.startswith(tail) and text[len(tail) :].isspace():
            return len(tail)
        return length

    def _back_over_think(self, pieces: list[Piece], text: str, length: int) -> int:
        """Training begins with the tag that opens the reasoning, which the template has just written."""
        if not text.strip() and pieces and pieces[-1].control == self.markup.ids.get("<think>", -2):
            pieces[-1].trained = True
            return 0
        found = re.search(r"<think>\s*$", text)
        return found.start() if found else length

    def _back_to_header(self, pieces: list[Piece], text: str, length: int, header: tuple[int | None, str]) -> int:
        """Training begins behind the header of the turn: a turn that is tool calls only has no other mark."""
        control, tail = header
        if control is None:
            found = text.rfind(tail)
            return found + len(tail) if found >= 0 else length
        position = len(pieces) - 1
        while position >= 0 and pieces[position].control != control:
            position -= 1
        if position < 0:
            return length
        for index in range(position + 1, len(pieces)):
            piece = pieces[index]
            if piece.control >= 0:
                piece.trained = True
            else:
                piece.spans = [(len(tail) if index == position + 1 else 0, len(piece.text))]
        return len(tail) if position == len(pieces) - 1 else 0


def drop_spans(marked: list[list[tuple[Piece, tuple[int, int] | None]]], answers: list[bool]) -> None:
    """Take back the training of the answers that do not count, in a template that marks answers itself.

    Raises:
        BadRecordError: the template marks more or fewer parts than there are answers.
    """
    if len(marked) != len(answers):
        raise BadRecordError(
            "template error", f"the template marks {len(marked)} parts, the record has {len(answers)} answers"
        )
    for group, counts in zip(marked, answers, strict=True):
        for piece, span in group if not counts else ():
            if span is None:
                piece.trained = False
            else:
                piece.spans.remove(span)
