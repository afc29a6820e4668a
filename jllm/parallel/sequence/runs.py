"""Which tokens of a row each of several ranks has: runs of neighbours, by the length of the row alone.

So every process works out the same runs without a message, for any length. `even` makes runs of equal length, for ranks
that share attention by its heads. `balanced` makes runs of equal cost, for ranks whose queries see all keys before
them: later tokens see more, so later runs are shorter.

Guarantees: the runs follow one another and cover the row; each has at least one token. Whole numbers throughout, so all
machines agree. Costs: one bisection a boundary, microseconds.
"""

import bisect
import dataclasses
import itertools

from jllm.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenCost:
    """What the tokens of a row cost in all layers, counted in keys that a layer's attention looks at.

    Attributes:
        apart: of a token, what does not depend on its place (linear maps, norms), for all layers together.
        windows: how many keys a token sees at most, and in how many layers; None: all keys before it.
    """

    apart: int = 0
    windows: tuple[tuple[int | None, int], ...] = ((None, 1),)

    def of_first(self, count: int) -> int:
        """That of the first `count` tokens of a row together."""
        return count * self.apart + sum(layers * _keys_seen(count, most) for most, layers in self.windows)

    def shares(self, bounds: tuple[int, ...]) -> list[float]:
        """What part of a row's cost each run has."""
        costs = [self.of_first(bound) for bound in bounds]
        return [(end - start) / costs[-1] for start, end in itertools.pairwise(costs)]


def _keys_seen(count: int, most: int | None) -> int:
    """The keys that the first `count` tokens see, each itself and those before it, at most `most`."""
    rising = count if most is None else min(count, most)
    return rising * (rising + 1) // 2 + (count - rising) * (most or 0)


def even(length: int, ranks: int) -> tuple[int, ...]:
    """The bounds [ranks + 1] of runs whose lengths differ by at most one."""
    _check(length, ranks)
    return tuple(length * rank // ranks for rank in range(ranks + 1))


def balanced(length: int, ranks: int, cost: TokenCost) -> tuple[int, ...]:
    """The bounds [ranks + 1] of runs that cost the same, as nearly as whole tokens allow."""
    _check(length, ranks)
    bounds, total = [0], cost.of_first(length)
    for rank in range(1, ranks):
        # Of the two bounds around the exact place the nearer one; costs are multiplied, so that nothing is rounded.
        above = bisect.bisect_left(range(length + 1), rank * total, key=lambda count: cost.of_first(count) * ranks)
        over = cost.of_first(above) * ranks - rank * total
        under = rank * total - cost.of_first(above - 1) * ranks
        wanted = above if over <= under else above - 1
        bounds.append(min(max(wanted, bounds[-1] + 1), length - (ranks - rank)))
    return (*bounds, length)


def _check(length: int, ranks: int) -> None:
    if length < ranks:
        raise UserError(
            f"--sequence_parallel_size {ranks}: rows of {length} tokens leave nothing for some processes; give at most"
            f" {length}"
        )
