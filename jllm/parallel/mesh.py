"""Who is where: the only place that turns ranks into stages and pipelines, and back.

The processes of a run are a grid with four axes. Along `pipe` they hold the stages of one model, along `data` copies of
it that see other rows, along `sequence` copies that see other tokens of the same rows, along `tensor` slices of one
stage. A *pipeline* is one copy of the model that trains on rows of its own: all ranks with one place along `data`.

Guarantees: rank ↔ places is a bijection for any sizes and order; the groups along any axes divide the ranks; all
processes get the same groups in the same order, as making process groups needs. Imports no torch, costs nothing.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Collection, Sequence
from typing import TypeVar

AXES = ("pipe", "data", "sequence", "tensor")
ORDER = ("data", "pipe", "sequence", "tensor")
"""The axes of a run, the outermost first: with stages only, ranks 0 to P - 1 are the first pipeline."""
BY_STAGE = ("pipe", "data", "sequence", "tensor")
"""The order in which consecutive ranks have the same stage of all pipelines."""

Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
    """The processes of a run along each axis.

    Attributes:
        pipe: stages of a model.
        data: pipelines.
        sequence: processes that share the tokens of a row.
        tensor: processes that share the weights of a stage.
        order: the axes, the outermost first: ranks that differ along the last one only are neighbours.
    """

    pipe: int = 1
    data: int = 1
    sequence: int = 1
    tensor: int = 1
    order: tuple[str, ...] = ORDER

    def __post_init__(self) -> None:
        assert sorted(self.order) == sorted(AXES), self.order
        assert all(self.size(axis) >= 1 for axis in AXES), self

    @classmethod
    def over(
        cls, world_size: int, *, pipe: int, sequence: int = 1, tensor: int = 1, order: tuple[str, ...] = ORDER
    ) -> "Mesh | None":
        """Pipelines of `pipe` stages of `sequence` x `tensor` processes over all; None where these do not divide."""
        data, rest = divmod(world_size, pipe * sequence * tensor)
        fits = data and not rest
        return cls(pipe=pipe, data=data, sequence=sequence, tensor=tensor, order=order) if fits else None

    def size(self, axis: str) -> int:
        """The number of places along an axis."""
        size: int = getattr(self, axis)
        return size

    @property
    def world_size(self) -> int:
        """The number of processes."""
        return math.prod(map(self.size, AXES))

    @property
    def ranks(self) -> tuple[int, ...]:
        """Every rank."""
        return tuple(range(self.world_size))

    @property
    def copies(self) -> int:
        """How many processes hold the same weights: what DeepSpeed's data axis is."""
        return self.data * self.sequence

    def place(self, rank: int) -> "Place":
        """Where a rank is."""
        assert 0 <= rank < self.world_size, rank
        found, left = {}, rank
        for axis in reversed(self.order):
            left, found[axis] = divmod(left, self.size(axis))
        return Place(mesh=self, rank=rank, **found)

    def rank_at(self, *, pipe: int = 0, data: int = 0, sequence: int = 0, tensor: int = 0) -> int:
        """Who is at a place; the inverse of `place`."""
        given = {"pipe": pipe, "data": data, "sequence": sequence, "tensor": tensor}
        rank = 0
        for axis in self.order:
            assert 0 <= given[axis] < self.size(axis), (axis, given[axis])
            rank = rank * self.size(axis) + given[axis]
        return rank

    def groups(self, *axes: str) -> tuple[tuple[int, ...], ...]:
        """The ranks that differ along these axes only: each group in the order of its ranks, the first rank's first."""
        assert set(axes) <= set(AXES), axes
        return tuple(self._spread(corner, axes) for corner in self._spread(0, [a for a in AXES if a not in axes]))

    def _spread(self, rank: int, axes: Collection[str]) -> tuple[int, ...]:
        """The ranks with every place along `axes`, else where `rank` is; ascending."""
        place = self.place(rank)
        choices = [range(self.size(axis)) if axis in axes else [getattr(place, axis)] for axis in self.order]
        return tuple(self.rank_at(**dict(zip(self.order, each, strict=True))) for each in itertools.product(*choices))

    @property
    def pipelines(self) -> tuple[tuple[int, ...], ...]:
        """The ranks of each pipeline."""
        return self.groups("pipe", "sequence", "tensor")

    @functools.cached_property
    def readers(self) -> tuple[int, ...]:
        """The one rank of each pipeline that reads data: its first stage's first."""
        return tuple(self.rank_at(data=data) for data in range(self.data))

    @property
    def writers(self) -> tuple[int, ...]:
        """The ranks that write a model's weights: those that hold its first copy, stage by stage."""
        places = itertools.product(range(self.pipe), range(self.tensor))
        return tuple(self.rank_at(pipe=pipe, tensor=tensor) for pipe, tensor in places)

    @property
    def ends(self) -> tuple[tuple[int, int], ...]:
        """The ranks of the first and the last stage of each copy of the model: they share what is tied."""
        return tuple((stages[0], stages[-1]) for stages in self.groups("pipe"))

    @functools.cached_property
    def stages(self) -> tuple[tuple[int, ...], ...]:
        """The ranks of each stage."""
        return self.groups("data", "sequence", "tensor")

    def table(self, hosts: Sequence[str]) -> list[str]:
        """For people: which ranks are where, a line for each host's ranks that work on one stage and the same tokens.

        Args:
            hosts: of the ranks.
        """
        shared = self.sequence > 1
        rows = [("ranks", "host", "pipeline", "stage", *["tokens"] * shared, "slices")]
        for ranks in self.groups("tensor"):
            place = self.place(ranks[0])
            where = (str(place.data), str(place.pipe), *[str(place.sequence)] * shared)
            for host, some in itertools.groupby(ranks, key=lambda rank: hosts[rank]):
                here = list(some)
                rows.append((_run(here), host, *where, _run([self.place(rank).tensor for rank in here])))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return ["  ".join(f"{each:<{width}}" for each, width in zip(row, widths, strict=True)).rstrip() for row in rows]

    def by_stage(self, values: Sequence[Value]) -> list[list[Value]]:
        """Every rank's value, by rank → the values of each stage's ranks, by rank."""
        assert len(values) == self.world_size
        return [[values[rank] for rank in ranks] for ranks in self.stages]


def _run(numbers: Sequence[int]) -> str:
    """Neighbours, for people."""
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """One rank of a mesh, and what falls to it.

    Attributes:
        mesh: of the run.
        rank: among all processes.
        pipe: its stage.
        data: its pipeline.
        sequence: its run of a row's tokens.
        tensor: its slice of the stage.
    """

    mesh: Mesh
    rank: int
    pipe: int
    data: int
    sequence: int
    tensor: int

    @property
    def is_first(self) -> bool:
        """Whether it speaks for the whole run: prints, records, finds what all are told."""
        return self.rank == 0

    def group(self, *axes: str) -> tuple[int, ...]:
        """The ranks that differ from this one along these axes only, itself included."""
        return self.mesh._spread(self.rank, axes)

    @property
    def reader(self) -> int:
        """The rank of its pipeline that reads data."""
        return self.mesh.rank_at(data=self.data)

    @property
    def is_reader(self) -> bool:
        """Whether it reads data for its pipeline."""
        return self.rank == self.reader

    @property
    def is_writer(self) -> bool:
        """Whether it writes the weights of its stage, of which other ranks may hold copies."""
        return self.data == self.sequence == 0

    @property
    def is_first_slice(self) -> bool:
        """Whether it speaks for the slices of its stage, which know the same numbers."""
        return self.tensor == 0

    @functools.cached_property
    def copies(self) -> tuple[int, ...]:
        """The ranks that hold the same weights, this one included."""
        return self.group("data", "sequence")

    @property
    def copy(self) -> int:
        """Its place among those, pipeline by pipeline, whatever the order of ranks."""
        return self.data * self.mesh.sequence + self.sequence

    def owns(self, number: int) -> bool:
        """Whether item `number` of what all copies of a stage hold alike is this one's to write: they take turns."""
        return self.copies[number % len(self.copies)] == self.rank

    def leads(self, holders: Sequence[int]) -> bool:
        """Of ranks that hold the same, whether it is the one that acts for all: whose norm counts, who completes."""
        return self.rank == holders[0]
