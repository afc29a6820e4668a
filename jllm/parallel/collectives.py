"""What all processes of a run find out together.

Messages go from CPU to CPU, so that no accelerator is waited for. Every method is called by all processes, in the same
order. Cost: one small message from everyone to everyone.
"""

import os
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from jllm.errors import UserError
from jllm.parallel.mesh import Mesh, Place

Fact = TypeVar("Fact")


class Collectives:
    """This process among the others.

    Attributes:
        mesh: of the run.
        place: this process's.
    """

    def __init__(self, mesh: Mesh) -> None:
        assert dist.get_world_size() == mesh.world_size
        self.mesh = mesh
        self.place: Place = mesh.place(dist.get_rank())
        self._group = dist.new_group(backend="gloo")

    @property
    def rank(self) -> int:
        """This process's number."""
        return self.place.rank

    def from_first_reader(self, find: Callable[[], Fact]) -> Fact:
        """What `find` returns on the first process, on every one; its `UserError` is raised on every process."""
        outcome: list[tuple[Fact | None, str | None]] = [(None, None)]
        if self.place.is_first:
            try:
                outcome = [(find(), None)]
            except UserError as error:
                outcome = [(None, str(error))]
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        fact, mistake = outcome[0]
        if mistake is not None:
            raise UserError(mistake)
        return fact  # type: ignore[return-value]

    def gather(self, value: Fact) -> list[Fact]:
        """Every process's value, by rank."""
        found: list[Fact | None] = [None] * self.mesh.world_size
        dist.all_gather_object(found, value, group=self._group)
        return found  # type: ignore[return-value]

    def gather_first(self, find: Callable[[], Fact | None]) -> Fact | None:
        """What `find` returns on the first process where that is not None; None where it is so on all."""
        return next((each for each in self.gather(find()) if each is not None), None)

    def gather_numbers(self, numbers: list[int]) -> torch.Tensor:
        """Every process's numbers, equally many on all: [world, n] int64, by rank. Cheaper than `gather`."""
        gathered = [torch.zeros(len(numbers), dtype=torch.int64) for _ in self.mesh.ranks]
        dist.all_gather(gathered, torch.tensor(numbers, dtype=torch.int64), group=self._group)
        return torch.stack(gathered)

    def total(self, value: int) -> int:
        """The sum of a number over all processes."""
        return self.totals([value])[0]

    def totals(self, values: list[int]) -> list[int]:
        """The sums of numbers, equally many on all processes."""
        numbers = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(numbers, group=self._group)
        return numbers.tolist()  # type: ignore[no-any-return]

    def sums(self, values: list[float]) -> list[float]:
        """The sums of fp64 numbers, equally many on all processes: added in the order of ranks, so always the same."""
        gathered = [torch.zeros(len(values), dtype=torch.float64) for _ in self.mesh.ranks]
        dist.all_gather(gathered, torch.tensor(values, dtype=torch.float64), group=self._group)
        return [sum(each) for each in zip(*(part.tolist() for part in gathered), strict=True)]

    @property
    def node(self) -> int:
        """This process's node, by its first process: the launcher numbers those of a node without gaps."""
        return self.rank - int(os.environ.get("LOCAL_RANK", "0"))

    @property
    def is_first_of_node(self) -> bool:
        """Whether this process does what a node needs once."""
        return self.rank == self.node

    def ranks_of_node(self) -> list[int]:
        """The processes on this process's node."""
        return [rank for rank, other in enumerate(self.gather(self.node)) if other == self.node]

    def barrier(self) -> None:
        """Wait for all processes."""
        dist.barrier(group=self._group)
