"""Plain local files in chunks that are planned: where each ends is found in the last bytes of it, and no more is read.

Guarantees: the chunks are those that reading the file as a whole gives. A file whose end was not there when planning
began ends where it ended then.
Cost: two reads of some ten KB for a chunk, whatever its size; lines are counted by whoever reads the chunk.
"""

import os
import stat
from collections.abc import Callable, Iterator
from typing import IO

from jllm.data.sources import json_lines
from jllm.data.sources.chunk import Chunk
from jllm.data.sources.records import too_large

_TAIL = 16 << 10
"""Bytes in which the end of a chunk is looked for first; then in 16 times as many, and so on."""
_COUNTED_AT_ONCE = 4 << 20


def can_be_planned(stream: IO[bytes]) -> bool:
    """Whether an open file has a size to go by: those that the system makes up say 0."""
    facts = os.fstat(stream.fileno())
    return stat.S_ISREG(facts.st_mode) and facts.st_size > 0


def chunks(
    stream: IO[bytes],
    path: str,
    number: int,
    position: int,
    line: int,
    index: int,
    size: int,
    most: int,
    last_boundary: Callable[[bytes, int, int], int],
) -> Iterator[Chunk]:
    """The chunks of an open file from byte `position` on, without their bytes.

    Args:
        number, index: of the source, and of the first chunk in it.
        line: number of the line at `position`.
        size: bytes in a chunk, about.
        most: bytes of the largest record.
        last_boundary: finds the end of the last record in bytes, as in `chunks.py`.

    Raises:
        RefusedRecordError: a record is larger than `most`.
    """
    file, end, begun = stream.fileno(), os.fstat(stream.fileno()).st_size, position
    searched, window = 0, size
    while True:
        at_end = end - position < window
        cut = end - position if at_end else _last_boundary(file, position, searched, window, last_boundary)
        if cut > 0:
            position += cut
            searched, window = 0, size
            yield Chunk(source=number, index=index, line=1, data=cut, end=position, end_line=0, file=path)
            index += 1
        elif not at_end and window > most:
            raise too_large(most, line + _lines(file, begun, position))
        elif not at_end:  # see `chunks.py`
            searched, window = window, 2 * window if 2 * window < most else max(window, most) + 1
        if at_end:
            return


def _last_boundary(
    file: int, position: int, searched: int, window: int, last_boundary: Callable[[bytes, int, int], int]
) -> int:
    """What `last_boundary` finds in the `window` bytes from `position` on, of which the first `searched` have none."""
    tail = _TAIL
    while tail < window - searched:
        data = os.pread(file, tail, position + window - tail)
        newline = data.find(b"\n") + 1  # the rest of a line may look like a whole one
        found = last_boundary(data[newline:], 0, len(data) - newline) if newline else 0
        if found:
            return window - len(data) + newline + found
        tail *= 16
    return last_boundary(os.pread(file, window, position), searched, window)


def _lines(file: int, begin: int, end: int) -> int:
    """How many lines end in these bytes."""
    stretches = range(begin, end, _COUNTED_AT_ONCE)
    return sum(json_lines.count_lines(os.pread(file, min(_COUNTED_AT_ONCE, end - at), at)) for at in stretches)
