"""The short cut for plain conversations: what a template made of their roles once, with gaps for their texts.

See `jllm.data.chat.rendering` for what is plain and how the short cut is checked.
"""

import array
import dataclasses
import re
from collections.abc import Sequence

from jllm.data.chat.marks import FIRST_STAND_IN, PRIVATE
from jllm.data.chat.segments import Flat, Piece, flatten

GAP = re.compile(f"a([{PRIVATE}])a")
"""The text that stands for a message while a form is learned: its stand-in between two letters."""
Place = tuple[int, tuple[int, ...]]
"""A place in a text: bytes of the template's own before it, and the messages before it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """A conversation with gaps.

    Attributes:
        texts: the texts that are the template's own; empty ones stand for the others.
        single: texts with one message in them: number of the text, what is before the message, its number, what is
            behind it.
        several: the other ones: number of the text, and the template's parts in turn with numbers of messages.
        controls, trained: as in `Flat`; shared by all conversations, never changed.
        answers: trained parts, if each begins at a fixed byte and ends behind one message: number of the text, first
            byte, end byte without the message, its number.
        spans: else the trained parts: number of the text, and both ends.
    """

    texts: list[str]
    single: tuple[tuple[int, str, int, str], ...]
    several: tuple[tuple[int, tuple[str | int, ...]], ...]
    controls: "array.array[int]"
    trained: bytearray
    answers: tuple[tuple[int, int, int, int], ...]
    spans: tuple[tuple[int, Place, Place], ...]

    def filled(self, messages: Sequence[str]) -> Flat:
        """The conversation with these texts in its gaps."""
        texts = self.texts.copy()
        for index, before, number, behind in self.single:
            texts[index] = f"{before}{messages[number]}{behind}"
        for index, parts in self.several:
            texts[index] = "".join([part if isinstance(part, str) else messages[part] for part in parts])
        spans = [
            (index, start, end + (len(text) if (text := messages[number]).isascii() else len(text.encode())))
            for index, start, end, number in self.answers
        ]
        if self.spans:
            sizes = [len(text.encode()) for text in messages]
            spans = [
                (index, start + sum([sizes[i] for i in before]), end + sum([sizes[i] for i in within]))
                for index, (start, before), (end, within) in self.spans
            ]
        return Flat(texts, self.controls, self.trained, spans)


def form_of(pieces: Sequence[Piece]) -> Form:
    """The form that a conversation has whose messages are gaps."""
    flat = flatten(pieces)
    texts: list[str] = []
    single: list[tuple[int, str, int, str]] = []
    several: list[tuple[int, tuple[str | int, ...]]] = []
    spans: list[tuple[int, Place, Place]] = []
    for piece in pieces:
        if piece.control >= 0:
            continue
        index, parts = len(texts), GAP.split(piece.text)
        spans += [(index, _place(piece.text, start), _place(piece.text, end)) for start, end in piece.spans]
        texts.append(parts[0] if len(parts) == 1 else "")
        if len(parts) == 3:
            single.append((index, parts[0], _number(parts[1]), parts[2]))
        elif len(parts) > 3:
            several.append((index, tuple(_number(part) if at % 2 else part for at, part in enumerate(parts))))
    answers = [(index, start, end, *of) for index, (start, before), (end, of) in spans if not before and len(of) == 1]
    is_simple = len(answers) == len(spans)
    return Form(
        texts=texts,
        single=tuple(single),
        several=tuple(several),
        controls=flat.controls,
        trained=flat.trained,
        answers=tuple(answers) if is_simple else (),
        spans=() if is_simple else tuple(spans),
    )


def _place(text: str, position: int) -> Place:
    split = GAP.split(text[:position])
    return len("".join(split[::2]).encode()), tuple(map(_number, split[1::2]))


def _number(stand_in: str) -> int:
    return ord(stand_in) - FIRST_STAND_IN
