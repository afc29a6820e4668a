"""Which elements of its whole tensor a parameter of this process has, in regions, and where each of them lies in it.

A parameter is its whole tensor, or a slice of it (`jllm.parallel.tensor.slices`). A slice of one range is one
rectangle; that of a packed tensor is one for each range. What a process has of a parameter is a run of its elements,
flattened: all of them, or with ZeRO stage 1 its share.

Costs: views, but of packed tensors that are cut along another axis than the first, whose elements are copied.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from jllm.parallel.tensor.slices import slice_of
from jllm.train.checkpoint.regions import Box, Region

_NOTHING = Box(offset=(), extent=())


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldRegion:
    """Elements of a run of a parameter that are one region of the whole tensor.

    Attributes:
        region: of the whole tensor.
        place: where, in the run, the box begins that they lie in; None where they are all of the run.
        box: that one, in the parameter.
        inside: where they lie in it.
    """

    region: Region
    place: int | None = None
    box: Box = _NOTHING
    inside: tuple[Any, ...] = ()

    def of(self, run: Tensor) -> Tensor:
        """These elements of a flat run, flat."""
        return self._view(run).reshape(-1)

    def put(self, run: Tensor, values: Tensor) -> None:
        """Write them."""
        view = self._view(run)
        view.copy_(values.view(view.shape))

    def _view(self, run: Tensor) -> Tensor:
        if self.place is None:
            return run
        return run[self.place : self.place + self.box.size].view(self.box.extent)[self.inside]


def parts_of(parameter: Tensor, start: int = 0, stop: int | None = None) -> list[HeldRegion]:
    """Elements [start, stop) of a parameter, flattened, in regions of its whole tensor; without numbers all of them."""
    stop = parameter.numel() if stop is None else stop
    held = slice_of(parameter)
    if held is None:
        return [HeldRegion(region=Region.of(tuple(parameter.shape), start=start, stop=stop))]
    rectangles = []
    place = 0
    for first, end in held.ranges:
        begins, lengths = [0] * len(held.shape), list(held.local_shape)
        begins[held.axis], lengths[held.axis] = place, end - first
        rectangles.append((Box(offset=tuple(begins), extent=tuple(lengths)), first - place))
        place += end - first
    if len(rectangles) == 1:
        [(box, moved)] = rectangles
        offset = _along(box.offset, held.axis, moved)
        return [HeldRegion(region=Region.of(held.shape, offset=offset, extent=box.extent, start=start, stop=stop))]
    found = []
    for place, box in Region.of(held.local_shape, start=start, stop=stop).boxes():
        for rectangle, moved in rectangles:
            if (common := box.intersection(rectangle)) is not None:
                region = Region.of(held.shape, offset=_along(common.offset, held.axis, moved), extent=common.extent)
                found.append(HeldRegion(region=region, place=place, box=box, inside=common.within(box)))
    return found


def read_parts(
    read: Callable[[Region], Tensor | None], parameter: Tensor, start: int = 0, stop: int | None = None
) -> Tensor | None:
    """Elements [start, stop) of a parameter, flat, as `read` gives their regions; None where it gives none."""
    stop = parameter.numel() if stop is None else stop
    parts = parts_of(parameter, start, stop)
    if len(parts) == 1 and parts[0].place is None:
        return read(parts[0].region)
    found: Tensor | None = None
    for part in parts:
        values = read(part.region)
        if values is None:
            return None
        found = torch.empty(stop - start, dtype=values.dtype) if found is None else found
        part.put(found, values)
    return torch.empty(0) if found is None else found


def _along(offset: tuple[int, ...], axis: int, moved: int) -> tuple[int, ...]:
    return (*offset[:axis], offset[axis] + moved, *offset[axis + 1 :])
