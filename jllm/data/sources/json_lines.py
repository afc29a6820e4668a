"""JSON lines: a value a line.

Cost: numpy finds the line ends, faster than `bytes` does; lines are not copied.
"""

import numpy as np
from numpy.typing import NDArray

from jllm.data.sources import json_values
from jllm.data.sources.records import Records


def last_boundary(data: bytes, searched: int, window: int) -> int:
    """The end of the last whole line in `data[:window]`; 0 where there is none behind `searched`."""
    return data.rfind(b"\n", searched, window) + 1


def record_beyond(data: bytes, most: int) -> int | None:
    """How many lines stand before the first one of more than `most` bytes; None where there is none."""
    ends = np.append(np.flatnonzero(_is_newline(data)), len(data))
    over = np.flatnonzero(np.diff(ends, prepend=-1) - 1 > most)
    return int(over[0]) if len(over) else None


def parse(data: bytes, line: int, *, keep_long: bool = False) -> Records:
    """The values of the lines, of which the first has the number `line`; `keep_long` as for `json_values`."""
    rows = _lines(data)
    return json_values.parse(rows, range(line, line + len(rows)), keep_long=keep_long)


def count_lines(data: bytes) -> int:
    """How many lines end in `data`."""
    return int(np.count_nonzero(_is_newline(data)))


def _lines(data: bytes) -> list[memoryview]:
    """The lines of `data`, without copies and without what splits them: half the time of `bytes.split`."""
    whole, ends = memoryview(data), np.flatnonzero(_is_newline(data)).tolist()
    starts = [0, *(end + 1 for end in ends)]
    return [whole[start:end] for start, end in zip(starts, [*ends, len(data)], strict=True)]


def _is_newline(data: bytes) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = np.frombuffer(data, dtype=np.uint8) == ord("\n")
    return found
