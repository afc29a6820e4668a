r"""Texts of many megabytes in JSON records, which stay as they were read until they are encoded.

Python holds a text with four bytes a character if one of them is beyond the basic plane, and a JSON parser has a copy
of its input beside it: six times the bytes of a record. A `LongText` is a view of the record instead, with places at
which the text may be cut: behind a line end that follows a printable ASCII character, and before an ASCII letter.
Nothing there is one escape sequence, one character, or what a Unicode normalisation puts together.

Guarantees: what is read so is what the parser reads: the rest of the record goes through it, and so does every piece
when it is read, which raises `BrokenTextError` where the parser would refuse it.
Whatever does not fit (a text without such places, a bad escape, half of a surrogate pair) is left to the caller.
Cost: numpy looks for the end of each long string, in what the processor's caches hold; each piece is parsed once.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

LONG = 16 << 20
"""Bytes of a record, and of a string in it, that are many."""
PIECE = 1 << 20
"""Bytes of a piece, or characters of one that was read already, at least."""
_WINDOW = 1 << 20
_QUOTE, _BACKSLASH = b'"\\'
# An escape sequence has up to six bytes: none of them may end with what looks like a character here.
# What is looked for comes first: that is found twenty times as fast as the same with what stands before it first.
_CUT_IN_JSON = re.compile(rb"\\n(?=[A-Za-z])(?<=[^\\]{5}[!-\[\]-~]\\n)")
_CUT = re.compile(r"\n(?=[A-Za-z])(?<=[!-~]\n)")


class BrokenTextError(ValueError):
    """A piece of a long text is not valid JSON."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongText:
    """A text in the JSON of its record.

    Attributes:
        escaped: what stands between the quotation marks.
        cuts: where it may be cut, in bytes of that, in order.
    """

    escaped: memoryview
    cuts: tuple[int, ...]

    def __iter__(self) -> Iterator[str]:
        """Its pieces.

        Raises:
            BrokenTextError: one is not valid, as for `whole` and `sample`.
        """
        for start, end in zip((0, *self.cuts), (*self.cuts, len(self.escaped)), strict=True):
            yield _parsed(self.escaped[start:end])

    @property
    def whole(self) -> str:
        """All of it."""
        return _parsed(self.escaped)

    def check(self) -> None:
        """Read all of it.

        Raises:
            BrokenTextError: it is not valid.
        """
        for _ in self:
            pass

    @property
    def sample(self) -> str:
        """One of its pieces, the same every time."""
        number = len(self.escaped) % (len(self.cuts) + 1)
        bounds = (0, *self.cuts, len(self.escaped))
        return _parsed(self.escaped[bounds[number] : bounds[number + 1]])


def pieces_of(text: str) -> Iterator[str]:
    """The pieces of a text that was read already, by the same rule; a short one is one piece."""
    start = 0
    while found := _CUT.search(text, start + PIECE):
        yield text[start : found.end()]
        start = found.end()
    yield text[start:] if start else text


def parse(row: memoryview) -> tuple[Any, list[LongText]]:
    """The value of a JSON record in which long strings are `LongText`, and all of those, which nobody has checked.

    Raises:
        ValueError: it has none that can be cut, or is not valid.
    """
    import orjson

    between: list[bytes] = []
    texts: list[LongText] = []
    place = 0
    for start, end in _long_strings(row):
        text = _long_text(row[start:end])
        if text is not None:
            between.append(bytes(row[place:start]))
            texts.append(text)
            place = end
    if not texts:
        raise ValueError("no long text")
    between.append(bytes(row[place:]))
    mark = _mark_apart_from(between)
    reduced = between[0] + b"".join(mark % number + each for number, each in enumerate(between[1:]))
    marks = {(mark % number).decode(): text for number, text in enumerate(texts)}
    return _replaced(orjson.loads(reduced), marks), texts


def _parsed(escaped: memoryview) -> str:
    import orjson

    try:
        text: str = orjson.loads(b"".join((b'"', escaped, b'"')))
    except ValueError as error:
        raise BrokenTextError(str(error)) from None
    return text


def _long_text(escaped: memoryview) -> LongText | None:
    """None where it cannot be cut."""
    cuts: list[int] = []
    while found := _CUT_IN_JSON.search(escaped, (cuts[-1] if cuts else 0) + PIECE):
        cuts.append(found.end())
    return LongText(escaped=escaped, cuts=tuple(cuts)) if cuts else None


def _long_strings(row: memoryview) -> Iterator[tuple[int, int]]:
    """Where strings of more than `LONG` bytes begin and end, without their quotation marks."""
    data = np.frombuffer(row, dtype=np.uint8)
    count, last = 0, 0
    for start in range(0, len(data), _WINDOW):
        marks = np.flatnonzero(data[start : start + _WINDOW] == _QUOTE) + start
        marks = marks[~_are_escaped(data, marks)]
        gaps = np.diff(marks, prepend=last)
        for number in np.flatnonzero(gaps > LONG).tolist():
            if (count + number) % 2:  # behind one that opens
                yield int(marks[number] - gaps[number]) + 1, int(marks[number])
        if len(marks):
            count, last = count + len(marks), int(marks[-1])


def _are_escaped(data: NDArray[np.uint8], marks: NDArray[np.intp]) -> NDArray[np.bool_]:
    """Whether an odd number of backslashes stands before each of these places."""
    found: NDArray[np.bool_] = (data[np.maximum(marks - 1, 0)] == _BACKSLASH) & (marks > 0)
    for number in np.flatnonzero(found & (data[np.maximum(marks - 2, 0)] == _BACKSLASH)).tolist():
        first = int(marks[number])
        while first and data[first - 1] == _BACKSLASH:
            first -= 1
        found[number] = (int(marks[number]) - first) % 2 == 1
    return found


def _mark_apart_from(parts: Sequence[bytes]) -> bytes:
    """A name with a place for a number which none of these parts has in it."""
    number = 0
    while any(b"long text %d." % number in part for part in parts):
        number += 1
    return b"long text %d." % number + b"%d"


def _replaced(value: Any, marks: dict[str, LongText]) -> Any:
    """The value with texts in place of their marks. Nothing calls itself here: values may be nested as deep as orjson
    reads them, which is deeper than Python's calls."""
    top = [value]
    left: list[Any] = [top]
    while left:
        holder = left.pop()
        if isinstance(holder, dict) and not marks.keys().isdisjoint(holder):
            raise ValueError("a long key")
        for place, item in holder.items() if isinstance(holder, dict) else enumerate(holder):
            if isinstance(item, str):
                if item in marks:
                    holder[place] = marks[item]
            elif isinstance(item, dict | list):
                left.append(item)
    return top[0]
