"""Which elements of a tensor a process has: a rectangle of the whole tensor, and a flat run of its elements.

A tensor-parallel rank has a rectangle of a parameter; ZeRO stage 1 gives a data-parallel rank a run of the flattened
rectangle. A run is cut into boxes: rectangles that are contiguous in it, at most `2 * axes - 1` of them. All reading is
then the intersection of the boxes that are wanted with the boxes that a file has.

Cost: arithmetic on a few integers for each box; no tensor is looked at.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Box:
    """A rectangle of a tensor: along axis i the elements [offset[i], offset[i] + extent[i])."""

    offset: tuple[int, ...]
    extent: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many elements it has."""
        return math.prod(self.extent)

    def intersection(self, other: "Box") -> "Box | None":
        """What both have; None for nothing."""
        offset = tuple(map(max, self.offset, other.offset))
        end = map(min, _ends(self), _ends(other))
        extent = tuple(stop - start for start, stop in zip(offset, end, strict=True))
        return Box(offset=offset, extent=extent) if all(count > 0 for count in extent) else None

    def without(self, inner: "Box") -> "list[Box]":
        """The rest of this box, in boxes, where `inner` lies within it."""
        found = []
        offset, extent = list(self.offset), list(self.extent)
        for axis, (start, count) in enumerate(zip(inner.offset, inner.extent, strict=True)):
            before, after = start - offset[axis], offset[axis] + extent[axis] - start - count
            for begin, length in ((offset[axis], before), (start + count, after)):
                if length:
                    found.append(
                        Box(
                            offset=(*offset[:axis], begin, *offset[axis + 1 :]),
                            extent=(*extent[:axis], length, *extent[axis + 1 :]),
                        )
                    )
            offset[axis], extent[axis] = start, count
        return found

    def within(self, outer: "Box") -> tuple[slice, ...]:
        """Where this box lies in a tensor that holds `outer`."""
        starts = (mine - theirs for mine, theirs in zip(self.offset, outer.offset, strict=True))
        return tuple(slice(start, start + count) for start, count in zip(starts, self.extent, strict=True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Region:
    """Elements of a tensor.

    Attributes:
        shape: of the whole tensor.
        offset, extent: the rectangle, along every axis.
        start, stop: the run of the rectangle's elements, flattened row by row, that is meant.
    """

    shape: tuple[int, ...]
    offset: tuple[int, ...]
    extent: tuple[int, ...]
    start: int
    stop: int

    @classmethod
    def of(
        cls,
        shape: tuple[int, ...],
        *,
        offset: tuple[int, ...] | None = None,
        extent: tuple[int, ...] | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> "Region":
        """A run of a rectangle; all of it, and the whole tensor, where nothing else is said."""
        offset = (0,) * len(shape) if offset is None else offset
        extent = shape if extent is None else extent
        return cls(
            shape=shape, offset=offset, extent=extent, start=start, stop=math.prod(extent) if stop is None else stop
        )

    @classmethod
    def from_json(cls, shape: list[int], entry: dict[str, Any]) -> "Region":
        """The inverse of `to_json`; without a rectangle, as in format 1, the run is one of the whole tensor."""
        offset, extent = (entry.get(name) for name in ("offset", "extent"))
        return cls.of(
            tuple(shape),
            offset=None if offset is None else tuple(offset),
            extent=None if extent is None else tuple(extent),
            start=entry["start"],
            stop=entry["stop"],
        )

    def to_json(self) -> dict[str, Any]:
        """All but the whole tensor's shape, as JSON values."""
        return {"offset": list(self.offset), "extent": list(self.extent), "start": self.start, "stop": self.stop}

    @property
    def size(self) -> int:
        """How many elements are meant."""
        return self.stop - self.start

    def run(self, start: int, stop: int) -> "Region":
        """Elements [start, stop) of the same rectangle."""
        return dataclasses.replace(self, start=start, stop=stop)

    def boxes(self) -> Iterator[tuple[int, Box]]:
        """The run in boxes of the whole tensor, in order, each with its place in the run.

        A box is contiguous in the run: elements [place, place + box.size) of it, row by row.
        """
        place = 0
        for box in _boxes_of_run(self.extent, self.start, self.stop):
            moved = tuple(inner + outer for inner, outer in zip(box.offset, self.offset, strict=True))
            yield place, Box(offset=moved, extent=box.extent)
            place += box.size


def strides(extent: tuple[int, ...]) -> tuple[int, ...]:
    """How far apart, in a rectangle flattened row by row, neighbours along each axis are."""
    return tuple(math.prod(extent[axis + 1 :]) for axis in range(len(extent)))


def _ends(box: Box) -> Iterator[int]:
    return (start + count for start, count in zip(box.offset, box.extent, strict=True))


def _boxes_of_run(extent: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Elements [start, stop) of a rectangle, flattened, in boxes relative to the rectangle."""
    if start >= stop:
        return
    if not extent:
        yield Box(offset=(), extent=())
        return
    row = math.prod(extent[1:])
    first, last = -(-start // row), stop // row  # whole rows [first, last)
    if first > last:  # within one row
        yield from _in_row(last, extent, start - last * row, stop - last * row)
        return
    if start < first * row:
        yield from _in_row(first - 1, extent, start - (first - 1) * row, row)
    if first < last:
        yield Box(offset=(first, *[0] * (len(extent) - 1)), extent=(last - first, *extent[1:]))
    if last * row < stop:
        yield from _in_row(last, extent, 0, stop - last * row)


def _in_row(number: int, extent: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    for box in _boxes_of_run(extent[1:], start, stop):
        yield Box(offset=(number, *box.offset), extent=(1, *box.extent))
