"""Which rows of an epoch make a step, and how they are grouped into micro-batches.

The rows of a global batch are fixed by their order alone: so many, or with `--batch_size_tokens` as many as fit into
the micro-batches of a step. What a row fills there is its length rounded up to a multiple of `LENGTH_MULTIPLE`; a
micro-batch fills its number of rows times its longest row.

`Parts` says how the rows of an epoch lie on the nodes. Usually every node has them all, one part. With `--dist_data`
each node has a part of its own, of which every step takes as many rows as that node's pipelines train on; a part that
ends before the others is filled up with masked rows. Rows consumed, the only cursor, count over all parts.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jllm.data.dataset.shards import Int32, Int64

LENGTH_MULTIPLE = 64
"""Micro-batches are padded to a multiple of this (or to `--seq_len`), so that few shapes occur."""


def padded_length(inputs: int, most: int | None) -> int:
    """The length that `inputs` tokens are padded to: a multiple of `LENGTH_MULTIPLE`, at most `most`."""
    length = -(-max(inputs, 1) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    return length if most is None else min(length, most)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenBudget:
    """Micro-batches by tokens.

    Attributes:
        tokens: a micro-batch, padding included, has at most these.
        micro_batches: of a step, over all pipelines.
        seq_len: the longest input allowed; None: any.
    """

    tokens: int
    micro_batches: int
    seq_len: int | None

    def groups(self, lengths: Int32) -> list[Int64]:
        """Rows of these lengths [N] in as few micro-batches as sorting allows, the largest rows first.

        A row longer than the budget is a micro-batch of its own. Cutting the sorted rows wherever the budget is reached
        needs the fewest micro-batches of all cuts, so more rows never need fewer.
        """
        by_length = np.argsort(-lengths, kind="stable")
        padded = [padded_length(length - 1, self.seq_len) for length in lengths[by_length].tolist()]
        cuts, start = [], 0
        while start < len(padded):
            start += max(1, self.tokens // padded[start])
            cuts.append(start)
        return np.split(by_length, cuts[:-1]) if cuts else []

    def rows_of_step(self, lengths: Int32) -> int:
        """How many of the next rows, of these lengths, make a step: all that fit, at least one."""
        fits, too_many = min(1, len(lengths)), 2
        while too_many <= len(lengths) and self._fits(lengths[:too_many]):
            fits, too_many = too_many, 2 * too_many
        too_many = min(too_many, len(lengths) + 1)
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            if self._fits(lengths[:middle]):
                fits = middle
            else:
                too_many = middle
        return fits

    def _fits(self, lengths: Int32) -> bool:
        return len(self.groups(lengths)) <= self.micro_batches

    def count_steps(self, lengths: Int32) -> int:
        """The steps of an epoch whose rows, in order, have these lengths."""
        steps = at = 0
        while at < len(lengths):
            at += self.rows_of_step(lengths[at:])
            steps += 1
        return steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """The rows of an epoch on the nodes.

    Attributes:
        rows: of each part.
        batch: rows of each part in a step.
        mine: the number of this process's part.
    """

    rows: tuple[int, ...]
    batch: tuple[int, ...]
    mine: int = 0

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return max(-(-rows // batch) for rows, batch in zip(self.rows, self.batch, strict=True))

    def taken_after(self, consumed: int) -> tuple[int, ...]:
        """The rows taken of each part when `consumed` rows are, over all parts."""
        if len(self.rows) == 1:
            return (consumed,)
        low, high = 0, self.steps
        while low < high:
            middle = (low + high) // 2
            if sum(self._taken(middle)) < consumed:
                low = middle + 1
            else:
                high = middle
        return self._taken(low)

    def _taken(self, steps: int) -> tuple[int, ...]:
        return tuple(min(steps * batch, rows) for rows, batch in zip(self.rows, self.batch, strict=True))

    def next(self, taken: Sequence[int]) -> tuple[int, ...]:
        """The rows taken of each part after one more step."""
        return tuple(min(at + batch, rows) for at, rows, batch in zip(taken, self.rows, self.batch, strict=True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpochSteps:
    """How many steps each epoch has; further epochs are like the last one given."""

    counts: tuple[int, ...]

    def total(self, epochs: int) -> int:
        """Steps of the first `epochs` epochs."""
        return sum(self.counts[:epochs]) + max(0, epochs - len(self.counts)) * self.counts[-1]

    def locate(self, step: int) -> tuple[int, int, int]:
        """The epoch of a step, both counted from 1; the step's number in it; how many steps the epoch has."""
        before = 0
        for epoch, count in enumerate(self.counts[:-1], start=1):
            if step <= before + count:
                return epoch, step - before, count
            before += count
        further, within = divmod(step - before - 1, self.counts[-1])
        return len(self.counts) + further, within + 1, self.counts[-1]
