"""A rendered conversation cut into what is encoded: control tokens, and text between them, with their trained parts.

Guarantees: nothing is cut but at control tokens, so the ids are those of the whole text tokenized once.
Cost: one pass over the text.
"""

import dataclasses
import re
from collections.abc import Iterable
from typing import NamedTuple

from jllm.data.conversations import BadRecordError
from jllm.data.marks import CALL, CLOSE, END, OPEN, REASONING, START, StandIns


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
        controls: for each piece a control token's id, or -1 for the next text.
        trained: for each piece, whether it is a control token that is trained on.
        spans: trained parts of texts: number of the text, first byte, end byte.
    """

    texts: list[str]
    controls: list[int]
    trained: list[bool]
    spans: list[tuple[int, int, int]]


def flatten(pieces: Iterable[Piece]) -> Flat:
    """Pieces in the form in which they are handed on."""
    flat = Flat([], [], [], [])
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
        end_of_turn: the token that ends an answer, in a template without marks of its own.
        header: what opens an answer there: the last control token in it, and the text behind that.
    """

    ids: dict[str, int]
    control: "re.Pattern[str]"
    marked: bool
    end_of_turn: int | None = None
    header: tuple[int | None, str] = (None, "")


class Builder:
    """Cuts one rendered text into pieces and follows the marks in it."""

    def __init__(self, markup: Markup, stand_ins: StandIns, everything: bool) -> None:
        self.markup = markup
        self.stand_ins = stand_ins.used
        self.everything = everything
        self.marked: list[list[tuple[Piece, tuple[int, int] | None]]] = []

    def build(self, rendered: str) -> list[Piece]:
        ids, header = self.markup.ids, self.markup.header
        end_of_turn, stand_ins, everything = self.markup.end_of_turn, self.stand_ins, self.everything
        pieces: list[Piece] = []
        text = Piece()
        parts: list[str] = []
        length = 0  # of the text piece so far
        since = 0 if everything else -1  # where in it training began; -1: not training
        ending = -1  # where in it an answer ended whose end of turn is yet to come
        at = 0
        group: list[tuple[Piece, tuple[int, int] | None]] = []

        def close_span(end: int) -> None:
            if 0 <= since < end:
                text.spans.append((since, end))
                group.append((text, (since, end)))

        for match in self.markup.control.finditer(rendered):
            begin = match.start()
            if begin > at:
                parts.append(rendered[at:begin])
                length += begin - at
            at = match.end()
            found = match.group()
            mark = found if len(found) == 1 and "\ue000" <= found <= "\uf8ff" else ""
            if not mark:
                index = ids.get(found)
                if index is None:
                    index = ids[found.strip()]
                final = False
                if ending >= 0:
                    blank = not "".join(parts)[ending - length :].strip() if ending < length else True
                    final = index == end_of_turn and blank
                    close_span(length if final else ending)
                    since, ending = (-1, -1)
                else:
                    close_span(length)
                    # A turn with tool calls, or cut by its template, goes on to the end of the turn.
                    final = since >= 0 and not everything and not self.markup.marked and index == end_of_turn
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
                continue
            if mark in stand_ins:
                parts.append(stand_ins[mark])
                length += len(stand_ins[mark])
            elif everything:
                continue
            elif mark in (START, OPEN):
                since = length if since < 0 else since
            elif mark == END:
                ending = length
                if end_of_turn is None:
                    close_span(length)
                    since, ending = -1, -1
            elif mark == CLOSE:
                close_span(length)
                since = -1
                self.marked.append(group)
                group = []
            elif mark == REASONING and since < 0:
                since = self._back_over_think(pieces, "".join(parts), length)
            elif mark == CALL and since < 0:
                since = self._back_to_header(pieces, "".join(parts), length, header)
        if at < len(rendered):
            parts.append(rendered[at:])
            length += len(rendered) - at
        close_span(ending if ending >= 0 else length)
        if parts:
            text.text = "".join(parts)
            pieces.append(text)
        return pieces

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
