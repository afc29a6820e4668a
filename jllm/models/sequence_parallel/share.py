"""A stage's share of the tokens: it cuts what travels whole, and says what its attention needs.

Labels, positions and ids travel whole to every rank of a sequence group; hidden states are those of a rank's own run
from the first stage to the last. Every stage works out the same runs, from the length of the rows alone.
"""

import dataclasses
import functools
import itertools
from typing import Any

from torch import Tensor

from jllm.models.pipeline.bundle import Planes
from jllm.models.sequence_parallel.seen import Seen
from jllm.parallel.sequence.group import SequenceGroup
from jllm.parallel.sequence.runs import TokenCost, balanced, even

ULYSSES, BALANCED = "ulysses", "balanced"
MODES = (ULYSSES, BALANCED)
"""Attention over all tokens with some of the heads; over the keys up to a run's end with all of them."""
KEYWORD = "shared_rows"
"""What layers hand on to their attention: with recomputation too it is that of the right micro-batch."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunPlan:
    """How the tokens of rows are shared.

    Attributes:
        mode: of `MODES`.
        ranks: that share them.
        cost: of tokens, which runs of `BALANCED` have alike.
        by_lengths: whether attention may use a kernel that takes the lengths of documents.
    """

    mode: str
    ranks: int
    cost: TokenCost
    by_lengths: bool = False

    @functools.lru_cache(maxsize=1024)  # noqa: B019 - a run has one plan
    def bounds(self, length: int) -> tuple[int, ...]:
        """Where the runs of rows of this length begin, and the last one ends."""
        return even(length, self.ranks) if self.mode == ULYSSES else balanced(length, self.ranks, self.cost)

    def said(self, length: int) -> list[str]:
        """For people: what the ranks have of rows of this length."""
        bounds = self.bounds(length)
        said = f"of {length:,} tokens {', '.join(f'{end - start:,}' for start, end in itertools.pairwise(bounds))}"
        if self.mode == BALANCED:
            over = max(self.cost.shares(bounds)) * self.ranks - 1
            said += f", the slowest with {over:.1%} more work than the mean"
        said += f"; attention {'by the lengths of documents' if self.by_lengths else 'under masks'}"
        return [f"{self.ranks} processes share the tokens of each row ({self.mode}): {said}"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SharedRows:
    """Rows of a micro-batch as one rank's attention sees them.

    Attributes:
        mode: as in `RunPlan`.
        group: the ranks that share them.
        bounds: of their runs.
        seen: by the queries that this rank attends with.
    """

    mode: str
    group: SequenceGroup
    bounds: tuple[int, ...]
    seen: Seen


@dataclasses.dataclass(frozen=True, eq=False)
class OwnPlanes(Planes):
    """The planes of one rank's run of rows.

    Attributes:
        group: the ranks that share the rows.
        tokens: of the whole micro-batch, B x S.
    """

    group: SequenceGroup
    tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SequenceShare:
    """The share of one rank.

    Attributes:
        plan: of the run.
        group: the ranks that share rows.
    """

    plan: RunPlan
    group: SequenceGroup

    def own(self, value: Tensor) -> Tensor:
        """Of something that has a number a token in its last axis what is of this rank's run."""
        start, end = self._run(value.shape[-1])
        return value[..., start:end]

    def own_planes(self, planes: Planes) -> OwnPlanes:
        """Of planes the same."""
        return OwnPlanes(planes.names, self.own(planes.stacked), self.group, planes.stacked[0].numel())

    def arguments(self, positions: Tensor) -> dict[str, Any]:
        """What the model's forward needs beside this rank's own tokens; `positions` are those of whole rows [B, S]."""
        length = positions.shape[-1]
        start, end = (0, length) if self.plan.mode == ULYSSES else self._run(length)
        rows = SharedRows(
            mode=self.plan.mode,
            group=self.group,
            bounds=self.plan.bounds(length),
            seen=Seen.of(positions, start, end, by_lengths=self.plan.by_lengths),
        )
        return {KEYWORD: rows}

    def _run(self, length: int) -> tuple[int, int]:
        bounds = self.plan.bounds(length)
        return bounds[self.group.rank], bounds[self.group.rank + 1]
