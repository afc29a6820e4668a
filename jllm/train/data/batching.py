"""Which rows of an epoch make a step, and how they are grouped into micro-batches.

The rows of a global batch are fixed by their order alone: so many, or with `--batch_size_tokens` as many as fit into
the micro-batches of a step. What a row fills there is its length rounded up to a multiple of `LENGTH_MULTIPLE`; a
micro-batch fills its number of rows times its longest row.

How rows are grouped by tokens is a rule with a number, which checkpoints keep, so that a run goes on by its own:

    1    a step takes the next rows while its micro-batches hold them, sorted by length
    2    the epoch's order is cut into windows of a fixed number of rows, worth about `WINDOW_MICRO_BATCHES`
         micro-batches; the rows of a window are sorted by length and cut into micro-batches, which then come in a
         seeded order; a step is the next so many micro-batches. Where documents are kept apart, rows are joined before
         (best fit), so that a micro-batch is a few long rows

Under both, rows consumed is all that a cursor needs, and neither the number of steps made nor that of pipelines has a
part in how rows are grouped. Rule 2 holds one window of rows in memory.

`Parts` says how the rows of an epoch lie on the nodes. Usually every node has them all, one part. With `--dist_data`
each node has a part of its own, of which every step takes as many rows as that node's pipelines train on; a part that
ends before the others is filled up with masked rows. Rows consumed, the only cursor, count over all parts.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from jllm.data.dataset.shards import Int32, Int64
from jllm.data.packing.best_fit import best_fit

LENGTH_MULTIPLE = 64
"""Micro-batches are padded to a multiple of this (or to `--seq_len`), so that few shapes occur."""
RULES = (1, 2)
NEWEST_RULE = RULES[-1]
WINDOW_MICRO_BATCHES = 64

MicroBatchRows = list[list[int]]
"""The rows of a micro-batch, each made of one or, where they are joined, several rows of the data, by their numbers."""


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
        rule: see the module.
        joins: rows may be joined, because documents do not attend to each other; from rule 2 on.
    """

    tokens: int
    micro_batches: int
    seq_len: int | None
    rule: int = 1
    joins: bool = False

    @property
    def capacity(self) -> int:
        """The longest that a row of a micro-batch may be, in inputs."""
        if self.seq_len is not None and self.seq_len <= self.tokens:
            return self.seq_len
        return max(1, self.tokens // LENGTH_MULTIPLE * LENGTH_MULTIPLE)

    def window_rows(self, mean_length: float) -> int:
        """The rows of a window, for data whose rows have `mean_length` tokens on average."""
        return max(1, int(WINDOW_MICRO_BATCHES * self.tokens / max(mean_length, 1.0)))

    def micro_batches_of_window(
        self, lengths: Int32, generator: np.random.Generator | None = None
    ) -> list[MicroBatchRows]:
        """The micro-batches of a window whose rows have these lengths, in the order that `generator` draws; without
        one, in the order of the first row of each."""
        if self.joins:
            # One longer than all others, which no micro-batch holds, is refused where its name is known.
            room = max(self.capacity + 1, int(lengths.max(initial=0)))
            rows = best_fit(lengths.astype(np.int64), room)
        else:
            rows = [[number] for number in range(len(lengths))]
        joined = np.array([int(lengths[row].sum()) for row in rows], dtype=np.int32) if self.joins else lengths
        found = [[rows[number] for number in group.tolist()] for group in self.groups(joined)]
        if generator is not None:
            return [found[number] for number in generator.permutation(len(found)).tolist()]
        return sorted(found, key=lambda micro_batch: min(itertools.chain.from_iterable(micro_batch)))

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
        """The steps of an epoch whose rows, in order, have these lengths; by rule 1."""
        steps = at = 0
        while at < len(lengths):
            at += self.rows_of_step(lengths[at:])
            steps += 1
        return steps

    def survey(self, lengths: Int32, *, window: int) -> "Filling":
        """What becomes of an epoch whose rows, in order, have these lengths.

        Args:
            window: rows of a window, for rule 2.
        """
        tokens: list[int] = []
        steps = 0
        if self.rule == 1:
            at = 0
            while at < len(lengths):
                rows = lengths[at : at + self.rows_of_step(lengths[at:])]
                tokens += [int(rows[group].sum()) - len(group) for group in self.groups(rows)]
                at, steps = at + len(rows), steps + 1
        else:
            for at in range(0, len(lengths), window):
                rows = lengths[at : at + window]
                for micro_batch in self.micro_batches_of_window(rows):
                    members = list(itertools.chain.from_iterable(micro_batch))
                    tokens.append(int(rows[members].sum()) - len(members))
            steps = -(-len(tokens) // self.micro_batches)
        made = max(1, len(tokens))
        half_empty = sum(2 * each < self.tokens for each in tokens)
        return Filling(steps=steps, filled=sum(tokens) / (made * self.tokens), half_empty=half_empty / made)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Filling:
    """How full the micro-batches of an epoch are.

    Attributes:
        steps: of the epoch.
        filled: the share of all that micro-batches could hold which are tokens.
        half_empty: the share of micro-batches that are less than half full.
    """

    steps: int
    filled: float
    half_empty: float


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
    """How many steps each epoch has; further epochs are like the last one given.

    Attributes:
        filling: of the first epoch, with a token budget.
        larger: a token budget that would fill micro-batches well, where this one does not.
    """

    counts: tuple[int, ...]
    filling: Filling | None = None
    larger: int | None = None

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
