"""Random ways in which a tensor lies on ranks."""

import itertools
import math

from hypothesis import strategies as st

from jllm.train.checkpoint.regions import Box, Region

SIDES = st.lists(st.integers(1, 5), min_size=0, max_size=4).map(tuple)


@st.composite
def regions(draw: st.DrawFn, shape: tuple[int, ...] | None = None) -> Region:
    """Any run of any rectangle of a tensor."""
    shape = draw(SIDES) if shape is None else shape
    offset = tuple(draw(st.integers(0, side - 1)) for side in shape)
    extent = tuple(draw(st.integers(1, side - begin)) for side, begin in zip(shape, offset, strict=True))
    start, stop = sorted(draw(st.tuples(*[st.integers(0, math.prod(extent))] * 2)))
    return Region.of(shape, offset=offset, extent=extent, start=start, stop=stop)


@st.composite
def tilings(draw: st.DrawFn) -> list[Region]:
    """A tensor cut into rectangles (tensor parallel), and these into flat runs (ZeRO); every element is in one."""
    shape = draw(SIDES)
    boxes = [Box(offset=(0,) * len(shape), extent=shape)]
    for _ in range(draw(st.integers(0, 3)) if shape else 0):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        axis = draw(st.integers(0, len(shape) - 1))
        cut = draw(st.integers(0, box.extent[axis]))
        lower = Box(offset=box.offset, extent=(*box.extent[:axis], cut, *box.extent[axis + 1 :]))
        upper = Box(
            offset=(*box.offset[:axis], box.offset[axis] + cut, *box.offset[axis + 1 :]),
            extent=(*box.extent[:axis], box.extent[axis] - cut, *box.extent[axis + 1 :]),
        )
        boxes += [half for half in (lower, upper) if half.size]
    found = []
    for box in boxes:
        edges = sorted({0, box.size, *draw(st.lists(st.integers(0, box.size), max_size=3))})
        for start, stop in itertools.pairwise(edges):
            found.append(Region.of(shape, offset=box.offset, extent=box.extent, start=start, stop=stop))
    return draw(st.permutations(found))
