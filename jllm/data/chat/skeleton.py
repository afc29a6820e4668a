"""What a template makes of the roles of a conversation, with gaps for its texts.

Guarantees: filled with texts that the template shows as they are, it is what the template makes of the conversation.
Cost: some string joins for each conversation, where a template runs for each message.
"""

import array
import dataclasses
import re
from collections.abc import Sequence

from jllm.data.chat.marks import FIRST_STAND_IN, PRIVATE
from jllm.data.chat.segments import FlatSegments, Segment, flatten

GAP = re.compile(f"a([{PRIVATE}])a")
"""The text that stands for a message while a skeleton is learned: its stand-in between two letters."""
Place = tuple[int, tuple[int, ...]]
"""A place in a text: bytes of the template's own before it, and the messages before it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Skeleton:
    """A conversation with gaps.

    Attributes:
        texts: the texts that are the template's own; empty ones stand for the others.
        single: texts with one message in them: number of the text, what is before the message, its number, what is
            behind it.
        several: the other ones: number of the text, and the template's own texts in turn with numbers of messages.
        controls, trained: as in `FlatSegments`; shared by all conversations, never changed.
        answers: what is trained on, if each stretch begins at a fixed byte and ends behind one message: number of the
            text, first byte, end byte without the message, its number.
        spans: else what is trained on: number of the text, and both ends.
    """

    texts: list[str]
    single: tuple[tuple[int, str, int, str], ...]
    several: tuple[tuple[int, tuple[str | int, ...]], ...]
    controls: "array.array[int]"
    trained: bytearray
    answers: tuple[tuple[int, int, int, int], ...]
    spans: tuple[tuple[int, Place, Place], ...]

    def filled(self, messages: Sequence[str]) -> FlatSegments:
        """The conversation with these texts in its gaps."""
        texts = self.texts.copy()
        for index, before, number, behind in self.single:
            texts[index] = f"{before}{messages[number]}{behind}"
        for index, items in self.several:
            texts[index] = "".join([item if isinstance(item, str) else messages[item] for item in items])
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
        return FlatSegments(texts, self.controls, self.trained, spans)


def skeleton_of(segments: Sequence[Segment]) -> Skeleton:
    """The skeleton of a conversation whose messages are gaps."""
    flat = flatten(segments)
    texts: list[str] = []
    single: list[tuple[int, str, int, str]] = []
    several: list[tuple[int, tuple[str | int, ...]]] = []
    spans: list[tuple[int, Place, Place]] = []
    for segment in segments:
        if segment.control >= 0:
            continue
        index, items = len(texts), GAP.split(segment.text)
        spans += [(index, _place(segment.text, start), _place(segment.text, end)) for start, end in segment.spans]
        texts.append(items[0] if len(items) == 1 else "")
        if len(items) == 3:
            single.append((index, items[0], _number(items[1]), items[2]))
        elif len(items) > 3:
            several.append((index, tuple(_number(item) if at % 2 else item for at, item in enumerate(items))))
    answers = [(index, start, end, *of) for index, (start, before), (end, of) in spans if not before and len(of) == 1]
    is_simple = len(answers) == len(spans)
    return Skeleton(
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
