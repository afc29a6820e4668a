"""The processes that share the weights of a stage, and the two ways in which activations pass between them.

What all of them have alike goes into sliced layers by `copied`, and comes out of them by `summed`: the one does nothing
forward and sums gradients backward, the other one sums forward and does nothing backward.

Guarantees: every process gets the same numbers, to the last bit. Cost of either: one all-reduce of its argument.
"""

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from jllm.parallel.alone import is_alone
from jllm.parallel.mesh import Mesh
from jllm.parallel.tensor.slices import chunk

_HANDLES: dict[str, Any] = {}
"""Process groups by their names."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TensorGroup:
    """The ranks that hold slices of one stage, as one of them sees them.

    Attributes:
        rank: this process's place among them.
        size: how many there are.
        handle: their process group.
        sharers: how many neighbours share one key/value head; 1 where none does.
        sharing: the process group of those that share this process's; None where none does.
    """

    rank: int
    size: int
    handle: Any
    sharers: int = 1
    sharing: Any = None

    def __post_init__(self) -> None:
        _HANDLES[self.name] = self.handle

    @property
    def name(self) -> str:
        """Of the process group, the same on all of its ranks."""
        return str(getattr(self.handle, "group_name", self.handle))

    @classmethod
    def make(cls, mesh: Mesh, rank: int, *, sharers: int = 1) -> "TensorGroup":
        """The group of process `rank`; every process of the run calls it, with the same number of sharers."""
        found, sharing = None, None
        for ranks in mesh.groups("tensor"):  # every process takes part in making every group
            handle = dist.new_group(list(ranks))
            if rank in ranks:
                found = ranks.index(rank), handle
            for first in range(0, len(ranks), sharers) if sharers > 1 else ():
                some = list(ranks[first : first + sharers])
                handle = dist.new_group(some)
                if rank in some:
                    sharing = handle
        assert found is not None
        return cls(rank=found[0], size=mesh.tensor, handle=found[1], sharers=sharers, sharing=sharing)

    @property
    def leads(self) -> bool:
        """Whether this process acts for all, in what they have alike."""
        return self.rank == 0

    @property
    def leads_sharers(self) -> bool:
        """Whether it acts for those that share its key/value head."""
        return self.rank % self.sharers == 0

    def shared_range(self, length: int) -> tuple[int, int]:
        """Where this process's part of so many key/value heads begins and ends; sharers have the same one."""
        return chunk(length, self.size // self.sharers, self.rank // self.sharers)


def copied(value: Tensor, group: TensorGroup) -> Tensor:
    """What all ranks have alike, for a sliced layer: its gradient is the sum of those of all ranks."""
    result: Tensor = _Copied.apply(value, group.name)  # type: ignore[no-untyped-call]
    return result


def summed(part: Tensor, group: TensorGroup) -> Tensor:
    """The sum over the ranks of what their slices give."""
    result: Tensor = _Summed.apply(part, group.name)  # type: ignore[no-untyped-call]
    return result


class SharedCopies:
    """`copied`, once for an input that several layers take, so that they share one all-reduce in the backward pass.

    The copy is forgotten when each of them has had it: nothing is kept from one forward pass to the next.
    """

    def __init__(self, group: TensorGroup) -> None:
        self.group = group
        self.takers = 0
        self._known: tuple[Tensor, Tensor, int] | None = None

    def __call__(self, value: Tensor) -> Tensor:
        """The copy of `value`."""
        if self._known is not None and self._known[0] is value:
            _, copy, left = self._known
        else:
            copy, left = copied(value, self.group), self.takers
        self._known = (value, copy, left - 1) if left > 1 else None
        return copy


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: str) -> Tensor:
        ctx.group = group
        return value.view_as(value)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _sum_of(gradient, ctx.group), None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: str) -> Tensor:
        return _sum_of(part, group)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _sum_of(part: Tensor, group: str) -> Tensor:
    if torch.compiler.is_compiling():
        found: Tensor = _summed_as_it_is(part, group)
        return found
    return _reduced(part, group)


def _reduced(part: Tensor, group: str) -> Tensor:
    total = part.clone(memory_format=torch.contiguous_format)
    if not is_alone():
        dist.all_reduce(total, group=_HANDLES[group])
    return total


@torch.library.custom_op("jllm::sum_over_ranks", mutates_args=())
def _summed_as_it_is(part: Tensor, group: str) -> Tensor:
    """For compilers, which do not look inside: names of groups are constants in what they make."""
    return _reduced(part, group)


@_summed_as_it_is.register_fake
def _like(part: Tensor, group: str) -> Tensor:
    return torch.empty_like(part, memory_format=torch.contiguous_format)
