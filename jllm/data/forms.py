"""The short cut for plain conversations: what a template made of their roles once, with gaps for their texts.

See `jllm.data.rendering` for what is plain and how the short cut is checked.
"""

import dataclasses
import re

from jllm.data.marks import FIRST_STAND_IN, PRIVATE
from jllm.data.pieces import Piece


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """A piece with gaps for the texts of messages.

    Attributes:
        fixed: the piece itself where it has no gap; shared by all conversations, never changed.
        parts: static text and numbers of messages, in turn.
        spans: trained parts: both ends as (static characters before it, messages of this piece before it).
    """

    fixed: Piece | None
    parts: tuple[str | int, ...] = ()
    spans: tuple[tuple[tuple[int, int], tuple[int, int]], ...] = ()

    def filled(self, texts: list[str]) -> Piece:
        """The piece with these texts of messages in its gaps."""
        parts = [part if type(part) is str else texts[part] for part in self.parts]  # type: ignore[index]
        if not self.spans:
            return Piece("".join(parts))
        lengths = [0]
        for part in self.parts:
            if type(part) is int:
                lengths.append(lengths[-1] + len(texts[part]))
        return Piece("".join(parts), spans=[(s + lengths[i], e + lengths[j]) for (s, i), (e, j) in self.spans])


def form_of(piece: Piece) -> Form:
    parts: list[str | int] = []
    gaps: list[int] = []  # where in the text each gap starts; a gap is three characters: "a", its stand-in, "a"
    at = 0
    for match in re.finditer(f"a([{PRIVATE}])a", piece.text):
        parts += [piece.text[at : match.start()], ord(match.group(1)) - FIRST_STAND_IN]
        gaps.append(match.start())
        at = match.end()
    parts.append(piece.text[at:])

    def end_point(position: int) -> tuple[int, int]:
        before = sum(gap < position for gap in gaps)
        return position - 3 * before, before

    spans = tuple((end_point(start), end_point(end)) for start, end in piece.spans)
    kept = tuple(part for part in parts if part != "")
    return Form(fixed=None if gaps else piece, parts=kept, spans=spans)
