"""Which rows there are, from the lengths of documents alone; a planner for each kind of packer.

A planner is fed the pieces of one block after another and gives plans of rows. It never sees a token. Its state is so
small that a run can stop and go on: with every block it is given a mark, and for any row it names the last mark from
which that row, and all behind it, can be planned again.

Cost: numpy over the pieces of a block; `BestFitPlanner` the algorithm of `best_fit.py`, in one go at the end.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

from jllm.data.dataset.columns import Int64
from jllm.data.packing import pieces as pieces_
from jllm.data.packing.documents import concatenated
from jllm.data.packing.pieces import Block, Pieces, Plan

Mark = Any
"""What the caller gives with a block, to find it again."""
Length = Callable[[Int64], Int64]
"""Tokens of rows to the length that the rows are written in."""
BATCH_TOKENS = 1 << 19


class Planner(Protocol):
    """Plans the rows of one split. `whole` planners plan none before `finish`."""

    whole: bool

    def feed(self, block: Block, pieces: Pieces, mark: Mark) -> Plan | None:
        """The rows that these pieces complete."""
        ...

    def finish(self) -> Iterator[Plan]:
        """The rows that are left when the split ends."""
        ...

    def before(self, row: int) -> tuple[Mark, dict[str, Any], int]:
        """From where row `row`, which is the next one that is wanted, can be planned again: a mark, the state to
        restore there, and the number of the first row that is planned then."""
        ...

    def restore(self, state: dict[str, Any]) -> None: ...


def _count(value: Any) -> int:
    """Raises:
    ValueError: what was read is no count.
    """
    if type(value) is not int or value < 0:
        raise ValueError(f"a count is {value!r:.40}")
    return value


class PiecePlanner:
    """A row of each piece."""

    whole = False

    def __init__(self, length: Length) -> None:
        self._length = length
        self._mark: tuple[Mark, int] = (None, 0)
        self._rows = 0

    def feed(self, block: Block, pieces: Pieces, mark: Mark) -> Plan | None:
        self._mark = (mark, self._rows)
        self._rows += len(pieces)
        return pieces_.planned(block, pieces, self._length(pieces.sizes)) if len(pieces) else None

    def finish(self) -> Iterator[Plan]:
        return iter(())

    def before(self, row: int) -> tuple[Mark, dict[str, Any], int]:
        mark, first = self._mark
        return mark, {"rows": first}, first

    def restore(self, state: dict[str, Any]) -> None:
        self._rows = _count(state["rows"])


class StreamPlanner:
    """All documents in one stream, cut into rows of `step + 1` tokens that overlap by one.

    Args:
        extra: tokens before those of the stream in each row.
        drop_tail: leave out the last row where it is shorter than the others.
    """

    whole = False

    def __init__(self, step: int, *, extra: int = 0, drop_tail: bool = False) -> None:
        self.step, self.extra, self.drop_tail = step, extra, drop_tail
        self._tokens = 0  # of the stream so far
        self._next = 0  # the row that is planned next
        self._held: Plan | None = None  # the stream from `_begin` on, which is not behind that row's first token
        self._begin = 0
        self._marks: collections.deque[tuple[int, Mark]] = collections.deque()

    def feed(self, block: Block, pieces: Pieces, mark: Mark) -> Plan | None:
        self._marks.append((self._tokens, mark))
        plan = pieces_.planned(block, pieces, np.empty(0, dtype=np.int64))
        held = plan if self._held is None else pieces_.joined([self._held, plan])
        self._held = held
        self._tokens += int(pieces.sizes.sum())
        first = self._next * self.step - self._begin
        rows = (self._tokens - self._next * self.step - 1) // self.step
        if rows <= 0:
            return None
        full = np.full(rows, self.step + 1 + self.extra, dtype=np.int64)
        made = pieces_.stretch(held, first, first + rows * self.step + 1)
        self._held = pieces_.stretch(held, first + rows * self.step, None)
        self._next += rows
        self._begin = self._next * self.step
        while len(self._marks) > 1 and self._marks[1][0] <= (self._next - rows) * self.step:
            self._marks.popleft()
        return dataclasses.replace(made, lengths=full, step=self.step)

    def finish(self) -> Iterator[Plan]:
        left = self._tokens - self._next * self.step
        if self._held is None or self.drop_tail or not (left > 1 or (left == 1 and not self._next)):
            return
        last = pieces_.stretch(self._held, self._next * self.step - self._begin, None)
        lengths = np.full(1, left + self.extra, dtype=np.int64)
        yield dataclasses.replace(last, lengths=lengths, step=self.step, ends=True)

    def before(self, row: int) -> tuple[Mark, dict[str, Any], int]:
        tokens, mark = next(each for each in reversed(self._marks) if each[0] <= row * self.step)
        return mark, {"tokens": tokens}, -(-tokens // self.step)

    def restore(self, state: dict[str, Any]) -> None:
        self._tokens = self._begin = _count(state["tokens"])
        self._next = -(-self._tokens // self.step)


class BestFitPlanner:
    """Pieces whole, in few rows, when all of the split are there.

    Args:
        room: tokens in a row.
        pack: sizes and room to rows, each the numbers of its pieces.
    """

    whole = True

    def __init__(self, room: int, length: Length, pack: Callable[[Int64, int], list[list[int]]]) -> None:
        self._room, self._length, self._pack = room, length, pack
        self._parts: list[tuple[Block, Pieces]] = []

    def feed(self, block: Block, pieces: Pieces, mark: Mark) -> Plan | None:
        self._parts.append((block, pieces))
        return None

    def finish(self) -> Iterator[Plan]:
        empty = np.empty(0, dtype=np.int64)
        starts = np.concatenate([empty, *(each.starts for _, each in self._parts)])
        sizes = np.concatenate([empty, *(each.sizes for _, each in self._parts)])
        part = np.repeat(np.arange(len(self._parts)), [len(each) for _, each in self._parts])
        masked = classes = None
        if any(each.masked is not None for _, each in self._parts):
            none = [np.zeros(len(each), np.int64) if each.masked is None else each.masked for _, each in self._parts]
            masked = np.concatenate(none)
        if self._parts and self._parts[0][1].classes is not None:
            classes = np.concatenate([each.classes for _, each in self._parts if each.classes is not None])
        cuts = concatenated([each.cuts for _, each in self._parts])
        rows = self._pack(sizes, self._room)
        at_once = max(1, -(-BATCH_TOKENS // self._room))
        for at in range(0, len(rows), at_once):
            some = rows[at : at + at_once]
            chosen = np.array([number for row in some for number in row], dtype=np.int64)
            counts = np.array([len(row) for row in some], dtype=np.int64)
            known, of_block = np.unique(part[chosen], return_inverse=True)
            yield Plan(
                blocks=tuple(self._parts[number][0] for number in known.tolist()),
                of_block=of_block,
                pieces=Pieces(
                    starts=starts[chosen],
                    sizes=sizes[chosen],
                    masked=None if masked is None else masked[chosen],
                    classes=None if classes is None else classes[chosen],
                    cuts=None if cuts is None else cuts[chosen],
                ),
                counts=counts,
                lengths=self._length(np.add.reduceat(sizes[chosen], np.cumsum(counts) - counts)),
            )
        self._parts = []

    def before(self, row: int) -> tuple[Mark, dict[str, Any], int]:
        raise AssertionError("its rows need all of the split")

    def restore(self, state: dict[str, Any]) -> None:
        pass
