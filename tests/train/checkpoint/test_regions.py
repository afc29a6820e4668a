"""Regions in boxes: every element of the run is in exactly one of them, in order, as numpy's own flattening has it."""

import math
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jllm.train.checkpoint.regions import Box, Region
from tests.train.checkpoint.layouts import SIDES, regions


def numbered(shape: tuple[int, ...]) -> Any:
    return np.arange(math.prod(shape)).reshape(shape)


def elements(region: Region) -> Any:
    """The elements of a region of `numbered`, by numpy alone."""
    rectangle = tuple(slice(begin, begin + count) for begin, count in zip(region.offset, region.extent, strict=True))
    return numbered(region.shape)[rectangle].reshape(-1)[region.start : region.stop]


def of_box(box: Box, shape: tuple[int, ...]) -> Any:
    return numbered(shape)[tuple(slice(begin, begin + n) for begin, n in zip(box.offset, box.extent, strict=True))]


@given(regions())
def test_boxes_are_the_run_in_order(region: Region) -> None:
    boxes = list(region.boxes())
    assert len(boxes) <= max(1, 2 * len(region.shape) - 1)
    assert [place for place, _ in boxes] == [0, *np.cumsum([box.size for _, box in boxes])][: len(boxes)]
    found = [of_box(box, region.shape).reshape(-1) for _, box in boxes]
    assert np.array_equal(np.concatenate([np.empty(0, dtype=int), *found]), elements(region))


@given(st.data())
def test_what_is_left_and_what_is_common_make_the_box(data: st.DataObject) -> None:
    shape = data.draw(SIDES)
    one, other = (Box(offset=r.offset, extent=r.extent) for r in (data.draw(regions(shape)), data.draw(regions(shape))))
    common = one.intersection(other)
    mine, theirs = set(of_box(one, shape).flat), set(of_box(other, shape).flat)
    if common is None:
        assert not mine & theirs
        return
    assert set(of_box(common, shape).flat) == mine & theirs
    assert np.array_equal(of_box(one, shape)[common.within(one)], of_box(common, shape))
    rest = [of_box(box, shape).reshape(-1) for box in one.without(common)]
    assert sorted(np.concatenate([np.empty(0, dtype=int), *rest])) == sorted(mine - theirs)  # none of them twice


@given(regions())
def test_json_and_back(region: Region) -> None:
    assert Region.from_json(list(region.shape), region.to_json()) == region


def test_a_run_of_format_1_is_one_of_the_whole_tensor() -> None:
    region = Region.from_json([4, 6], {"start": 5, "stop": 20})
    assert region == Region.of((4, 6), start=5, stop=20)
    assert region.size == 15
