"""The processes that share the tokens of a row, as one of them sees them."""

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from jllm.parallel.alone import is_alone
from jllm.parallel.mesh import Mesh


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SequenceGroup:
    """The ranks that hold runs of the same rows.

    Attributes:
        rank: this process's place among them, in the order of their runs.
        size: how many there are.
        handle: their process group.
    """

    rank: int
    size: int
    handle: Any

    @classmethod
    def make(cls, mesh: Mesh, rank: int) -> "SequenceGroup":
        """The group of process `rank`; every process of the run calls it."""
        found = None
        for ranks in mesh.groups("sequence"):  # every process takes part in making every group
            handle = dist.new_group(list(ranks))
            if rank in ranks:
                found = cls(rank=ranks.index(rank), size=mesh.sequence, handle=handle)
        assert found is not None
        return found

    @property
    def is_first(self) -> bool:
        """Whether it speaks for the ranks where all of them know the same numbers."""
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """The sum of all ranks' numbers, place by place."""
        found = values.clone(memory_format=torch.contiguous_format)
        if not is_alone():
            dist.all_reduce(found, group=self.handle)
        return found
