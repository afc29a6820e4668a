"""The short cut for plain conversations: what a template made of their roles once, with gaps for their texts.

See `jllm.data.rendering` for what is plain and how the short cut is checked.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from jllm.data.marks import FIRST_STAND_IN, PRIVATE
from jllm.data.pieces import Flat, Piece, flatten

GAP = re.compile(f"a([{PRIVATE}])a")
"""The text that stands for a message while a form is learned: its stand-in between two letters."""
Place = tuple[int, tuple[int, ...]]
"""A place in a text: bytes of the template's own before it, and the messages before it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """A conversation with gaps.

    Attributes:
        texts: each text: the template's own, and in turn with it numbers of messages; it begins and ends with a text.
        controls, trained: as in `Flat`; shared by all conversations, never changed.
        spans: number of the text, and both ends of a trained part.
        sized: the messages whose sizes these ends depend on.
    """

    texts: tuple[tuple[str | int, ...], ...]
    controls: list[int]
    trained: list[bool]
    spans: tuple[tuple[int, Place, Place], ...]
    sized: tuple[int, ...]

    def filled(self, messages: Sequence[str]) -> Flat:
        """The conversation with these texts in its gaps."""
        texts = [_joined(parts, messages) for parts in self.texts]
        sizes = {}
        for number in self.sized:
            message = messages[number]
            sizes[number] = len(message) if message.isascii() else len(message.encode())
        spans = [
            (number, start + sum([sizes[i] for i in before]), end + sum([sizes[i] for i in within]))
            for number, (start, before), (end, within) in self.spans
        ]
        return Flat(texts, self.controls, self.trained, spans)


def _joined(parts: tuple[Any, ...], messages: Sequence[str]) -> str:
    if len(parts) == 1:
        own: str = parts[0]
        return own
    if len(parts) == 3:
        before, number, behind = parts
        return f"{before}{messages[number]}{behind}"
    return "".join([messages[part] if type(part) is int else part for part in parts])


def form_of(pieces: Sequence[Piece]) -> Form:
    """The form that a conversation has whose messages are gaps."""
    flat = flatten(pieces)
    texts: list[tuple[str | int, ...]] = []
    spans: list[tuple[int, Place, Place]] = []
    for piece in pieces:
        if piece.control >= 0:
            continue
        spans += [(len(texts), _place(piece.text, start), _place(piece.text, end)) for start, end in piece.spans]
        texts.append(tuple(_number(part) if index % 2 else part for index, part in enumerate(GAP.split(piece.text))))
    sized = {number for _, start, end in spans for number in (*start[1], *end[1])}
    return Form(
        texts=tuple(texts), controls=flat.controls, trained=flat.trained, spans=tuple(spans), sized=tuple(sorted(sized))
    )


def _place(text: str, position: int) -> Place:
    split = GAP.split(text[:position])
    return len("".join(split[::2]).encode()), tuple(map(_number, split[1::2]))


def _number(stand_in: str) -> int:
    return ord(stand_in) - FIRST_STAND_IN
