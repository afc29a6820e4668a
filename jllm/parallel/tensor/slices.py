"""Which part of a whole tensor a process has: ranges along one axis, one after another.

A slice is one range, but for packed tensors: those that hold several maps behind one another, of each of which a
process has its part. What is cut evenly is cut as `torch.chunk` does it: the last ranks may have less.

Costs: `cut` copies the slice; the whole tensor is free when nobody else holds it.
"""

import dataclasses
import itertools
import math

import torch
from torch import Tensor, nn

Ranges = tuple[tuple[int, int], ...]
"""(start, stop) each."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slice:
    """A process's part of a tensor.

    Attributes:
        shape: of the whole tensor.
        axis: that it is cut along.
        ranges: along that axis, in the order in which they lie in the part.
    """

    shape: tuple[int, ...]
    axis: int
    ranges: Ranges

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Of the part."""
        length = sum(stop - start for start, stop in self.ranges)
        return (*self.shape[: self.axis], length, *self.shape[self.axis + 1 :])

    def of(self, whole: Tensor) -> Tensor:
        """The part of a whole tensor, copied."""
        return self.seen_in(whole).clone(memory_format=torch.contiguous_format)

    def seen_in(self, whole: Tensor) -> Tensor:
        """The part of a whole tensor, copied only where it is several ranges."""
        parts = [whole.narrow(self.axis, start, stop - start) for start, stop in self.ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.axis)

    def in_blocks(self, size: int) -> "Slice | None":
        """The same part of the tensor's blocks of `size` elements that follow one another, [rows, blocks of a row].

        The last block of the tensor may have less. None where the part has some elements of a block without the others.
        """
        rows, inner = math.prod(self.shape[: self.axis]), math.prod(self.shape[self.axis + 1 :])
        length = self.shape[self.axis] * inner
        ends = {end * inner for each in self.ranges for end in each}
        if any(end % size and end != length for end in ends) or (rows > 1 and length % size):
            return None
        ranges = tuple((start * inner // size, -(-stop * inner // size)) for start, stop in self.ranges)
        return Slice(shape=(rows, -(-length // size)), axis=1, ranges=ranges)


def chunk(length: int, size: int, rank: int) -> tuple[int, int]:
    """Where part `rank` of `size` begins and ends, as `torch.chunk` cuts."""
    step = -(-length // size)
    return min(rank * step, length), min((rank + 1) * step, length)


def chunks_of_packed(lengths: tuple[int, ...], size: int, rank: int) -> Ranges:
    """The part of each of several that lie behind one another, of these lengths."""
    starts = itertools.accumulate(lengths, initial=0)
    return tuple(
        (start + chunk(length, size, rank)[0], start + chunk(length, size, rank)[1])
        for start, length in zip(starts, lengths, strict=False)
    )


def cut(module: nn.Module, name: str, axis: int, ranges: Ranges) -> None:
    """Put this process's part in the place of a module's parameter, but for one that was cut while it was loaded."""
    whole = module.get_parameter(name)
    if (known := slice_of(whole)) is not None:
        assert known == Slice(shape=known.shape, axis=axis % len(known.shape), ranges=ranges), name
        return
    axis %= whole.ndim
    part = Slice(shape=tuple(whole.shape), axis=axis, ranges=ranges)
    local = nn.Parameter(part.of(whole.detach()), requires_grad=whole.requires_grad)
    mark_slice(local, part)
    setattr(module, name, local)


def mark_slice(parameter: nn.Parameter, part: Slice) -> None:
    """Say what of its whole tensor a parameter is. Those in few bits have shapes of their own."""
    assert not parameter.is_floating_point() or tuple(parameter.shape) == part.local_shape, part
    parameter.jllm_slice = part  # type: ignore[attr-defined]


def slice_of(parameter: Tensor) -> Slice | None:
    """What of its whole tensor a parameter is; None where it is all of it."""
    return getattr(parameter, "jllm_slice", None)


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape of the whole tensor that a parameter is, or is a slice of."""
    part = slice_of(parameter)
    return tuple(parameter.shape) if part is None else part.shape
