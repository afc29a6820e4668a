"""Shards → steps of micro-batches, and the cursor.

Exactly one process of a pipeline reads: the first stage's. Rows come in the order of `jllm.train.data.order`; the rows
of a global batch are fixed by that order and the batching rule, then dealt to the data-parallel pipelines. The only
state is the number of rows consumed. A last global batch that is short is filled with fully masked rows: no row is
trained twice, none is dropped.

The first step of a run is padded to the largest micro-batch that its data can make, so that memory that does not
suffice fails there, and not hours later.

Cost: the windows of `jllm.train.data.rows` and the micro-batches of two steps.
"""

import dataclasses
import itertools
import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jllm.data.dataset.shards import IGNORE_INDEX
from jllm.errors import UserError
from jllm.models.attention import DocumentBounds
from jllm.models.pipeline.bundle import CONTROL_CLASS, DOCUMENTS, LABELS, POSITION_IDS, READ
from jllm.train.data.batching import LENGTH_MULTIPLE, MicroBatchRows, Parts, TokenBudget, padded_length
from jllm.train.data.collate import MicroBatch, collate
from jllm.train.data.order import EpochOrder
from jllm.train.data.row_checks import RowError, check_classes, checked_pairs
from jllm.train.data.rows import Row, ShardIndex, joined, read_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cursor:
    """Where a run stands in its data: the epoch, and the rows of it that are consumed, over all pipelines."""

    epoch: int = 0
    rows: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One pipeline's share of a global batch.

    Attributes:
        micro_batches: of shape [B, S]; the same for all, but with a token budget.
        rows: rows of the whole global batch that are not filling, over all pipelines.
        tokens: inputs of this share that are not padding.
        trained_tokens: targets of this share.
        length: the largest S.
        start: the cursor before the step.
        room: tokens that the micro-batches of this share could hold.
        documents: of any micro-batch, where they are kept apart.
        pairs: preference pairs of this share; 0 where rows are no pairs.
    """

    micro_batches: list[MicroBatch]
    rows: int
    tokens: int
    trained_tokens: int
    length: int
    start: Cursor
    room: int = 0
    documents: DocumentBounds | None = None
    pairs: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grouped:
    """A global batch whose rows are grouped to micro-batches already.

    Attributes:
        rows: of all micro-batches, in the order in which they are consumed.
        numbers: of these rows in the epoch's order.
        micro_batches: places in `rows`.
    """

    rows: list[Row]
    numbers: list[int]
    micro_batches: list[MicroBatchRows]

    def __len__(self) -> int:
        return len(self.rows)


_Numbered = tuple[int, Row]
"""A row with its number in the epoch's order."""


def _grouped(micro_batches: list[list[list[_Numbered]]]) -> Grouped:
    members = [each for micro_batch in micro_batches for row in micro_batch for each in row]
    places = iter(range(len(members)))
    return Grouped(
        rows=[row for _, row in members],
        numbers=[number for number, _ in members],
        micro_batches=[[list(itertools.islice(places, len(row))) for row in each] for each in micro_batches],
    )


def _without_first(micro_batch: list[list[_Numbered]], count: int) -> tuple[list[list[_Numbered]], int]:
    """A micro-batch without its first `count` rows of the data, and how many of them lie beyond it."""
    kept = []
    for row in micro_batch:
        dropped = min(count, len(row))
        count -= dropped
        if row[dropped:]:
            kept.append(row[dropped:])
    return kept, count


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchShare:
    """Which rows of a global batch one pipeline takes, and in what shape.

    Attributes:
        micro_batch: rows of a micro-batch.
        accumulation: micro-batches of a step.
        data_rank, data_size: which of how many pipelines that divide the rows among them.
        seq_len: the longest input allowed; None: whatever the rows need.
        positions: the longest input that the model has positions for, padding included; None: any.
        block_mask: position ids restart at each document.
        vocab_size: ids must be below.
        budget: makes micro-batches by tokens instead of by rows.
        longest: inputs of the longest row there is, which the first step is padded to; None: it is not.
        planes: what is made of the rows, by name.
        references: rows of preference pairs have reference log-probabilities, which are checked.
    """

    micro_batch: int
    accumulation: int
    data_rank: int
    data_size: int
    seq_len: int | None
    block_mask: bool
    vocab_size: int
    budget: TokenBudget | None = None
    longest: int | None = None
    positions: int | None = None
    planes: tuple[str, ...] = READ
    references: bool = False

    @property
    def most(self) -> int | None:
        """The longest input allowed, by the options and the model."""
        return min((each for each in (self.seq_len, self.positions) if each is not None), default=None)

    @property
    def global_batch(self) -> int:
        return self.micro_batch * self.accumulation * self.data_size

    def global_batches(
        self, index: ShardIndex, order: EpochOrder, start: int, *, ahead: bool
    ) -> Iterator[Sequence[Row] | Grouped]:
        """Global batches of this part of an epoch, from its row number `start` on."""
        if self.budget is not None and self.budget.rule > 1:
            return self.grouped_batches(index, order, start, ahead=ahead)
        return self.batches(read_rows(index, order, start, ahead=ahead))

    def grouped_batches(self, index: ShardIndex, order: EpochOrder, start: int, *, ahead: bool) -> Iterator[Grouped]:
        """Global batches of an epoch by windows, from `start` consumed rows on."""
        assert self.budget is not None
        size = self.budget.window_rows(index.mean_length)
        window, skip = divmod(start, size)
        rows = read_rows(index, order, window * size, ahead=ahead)
        waiting: list[list[list[_Numbered]]] = []
        while part := list(itertools.islice(rows, size)):
            lengths = np.array([len(row.ids) for row in part], dtype=np.int32)
            drawn = order.generator(3, window) if order.shuffled else None
            for micro_batch in self.budget.micro_batches_of_window(lengths, drawn):
                members = [[(window * size + place, part[place]) for place in row] for row in micro_batch]
                members, skip = _without_first(members, skip)
                if members:
                    waiting.append(members)
                if len(waiting) == self.budget.micro_batches:
                    yield _grouped(waiting)
                    waiting = []
            window += 1
        if waiting:
            yield _grouped(waiting)

    def batches(self, rows: Iterator[Row]) -> Iterator[list[Row]]:
        """Global batches of the rows of an epoch; empty ones without end where they are used up."""
        if self.budget is None:
            while True:
                yield list(itertools.islice(rows, self.global_batch))
        waiting: list[Row] = []
        wanted = 1
        while True:
            waiting += itertools.islice(rows, wanted - len(waiting))
            fits = self.budget.rows_of_step(np.array([len(row.ids) for row in waiting], dtype=np.int32))
            if fits == wanted:  # further rows may fit too
                wanted *= 2
                continue
            yield waiting[:fits]
            waiting, wanted = waiting[fits:], fits + 1

    def step_of(self, batch: Sequence[Row] | Grouped, start: Cursor, *, rows_everywhere: int | None = None) -> Step:
        """This pipeline's step out of a global batch.

        Args:
            batch: at most `global_batch` rows, or as many as the budget allows.
            start: the cursor before the step.
            rows_everywhere: rows of the step over all parts; None: these.

        Raises:
            RowError: a row is too long, or has ids that the model does not know.
        """
        rows = batch.rows if isinstance(batch, Grouped) else batch
        needed = max((len(row.ids) for row in rows), default=2) - 1
        self._check_lengths(rows, needed)
        if CONTROL_CLASS in self.planes:
            check_classes(rows)
        pairs = checked_pairs(rows, references=self.references) if DOCUMENTS in self.planes else [0] * len(rows)
        largest = self.longest if start == Cursor() else None
        if self.budget is None:
            size = self.micro_batch * self.accumulation
            mine = range(self.data_rank * size, min((self.data_rank + 1) * size, len(rows)))
            filled: list[Row | None] = [rows[place] for place in mine]
            filled += [None] * (size - len(filled))
            length = padded_length(max(needed, largest or 0), self.most)
            micro_batches = collate(
                filled, length, micro_batch=self.micro_batch, block_mask=self.block_mask, planes=self.planes
            )
            places: Sequence[int] = mine
        else:
            if isinstance(batch, Grouped):
                groups = batch.micro_batches
            else:
                by_count = self.budget.groups(np.array([len(row.ids) for row in rows], dtype=np.int32))
                groups = [[[place] for place in group.tolist()] for group in by_count]
            if largest is not None and self.budget.joins:
                largest = self.budget.capacity
            dealt = groups[self.data_rank :: self.data_size]
            places = [place for group in dealt for members in group for place in members]
            groups_of_rows: list[list[Row | None]] = [
                [joined([rows[place] for place in members], trims=DOCUMENTS in self.planes) for members in group]
                for group in dealt
            ]
            groups_of_rows += [[None] for _ in range(self.accumulation - len(dealt))]
            # The one with the fewest rows has the most room for long ones.
            fewest = min(range(len(groups_of_rows)), key=lambda number: len(groups_of_rows[number]))
            micro_batches = [
                self._collate_group(group, largest, is_longest=number == fewest)
                for number, group in enumerate(groups_of_rows)
            ]
        self._check_ids(rows, places)
        return Step(
            micro_batches=micro_batches,
            rows=len(rows) if rows_everywhere is None else rows_everywhere,
            tokens=sum(max(min(rows[place].real_length, len(rows[place].ids)) - 1, 0) for place in places),
            trained_tokens=sum(
                int(np.count_nonzero(each.planes[LABELS].numpy() != IGNORE_INDEX)) for each in micro_batches
            ),
            length=max(each.input_ids.shape[1] for each in micro_batches),
            start=start,
            room=sum(each.input_ids.numel() for each in micro_batches)
            if self.budget is None
            else self.accumulation * self.budget.tokens,
            documents=DocumentBounds.of(each.planes[POSITION_IDS] for each in micro_batches)
            if self.block_mask
            else None,
            pairs=sum(pairs[place] for place in places),
        )

    def _collate_group(self, rows: list[Row | None], largest: int | None, *, is_longest: bool) -> MicroBatch:
        """One micro-batch; with `largest`, filled up to what rows of at most so many inputs could make of the budget:
        `is_longest` as long as they are, the others as many tokens as fit."""
        needed = max((len(row.ids) - 1 for row in rows if row is not None), default=1)
        length = padded_length(needed, self.most)
        if largest is not None:
            assert self.budget is not None
            budget = self.budget.tokens
            longer = (
                padded_length(min(each, largest), self.most)
                for each in range(length, largest + LENGTH_MULTIPLE, LENGTH_MULTIPLE)
            )
            lengths = [length, *(each for each in longer if length < each <= budget // len(rows))]
            length = max(lengths, key=lambda each: (0 if is_longest else budget // each * each, each))
            rows = rows + [None] * (budget // length - len(rows))
        return collate(rows, length, micro_batch=len(rows), block_mask=self.block_mask, planes=self.planes)[0]

    def _check_lengths(self, rows: Sequence[Row], needed: int) -> None:
        most = self.most if self.most is not None else needed
        if self.budget is not None and padded_length(needed, self.most) > self.budget.tokens:
            place = max(range(len(rows)), key=lambda place: len(rows[place].ids))
            raise RowError(
                f"--batch_size_tokens {self.budget.tokens}: a row has {needed + 1} tokens, a micro-batch of"
                f" {padded_length(needed, self.most)} with its padding; give at least that",
                place,
            )
        if needed > most:
            place = max(range(len(rows)), key=lambda place: len(rows[place].ids))
            if most != self.seq_len:
                raise RowError(
                    f"a row has {needed + 1} tokens, and the model has learned positions for {most}; make shards with"
                    f" --max_len {most + 1}",
                    place,
                )
            raise RowError(
                f"--seq_len {most}: a row has {needed + 1} tokens, which needs {needed}; raise it, or make shards with"
                f" --max_len {most + 1}",
                place,
            )

    def _check_ids(self, rows: Sequence[Row], places: Sequence[int]) -> None:
        for place in places:
            ids = rows[place].ids
            # As unsigned numbers negative ids are the largest.
            if len(ids) and int(ids.view(np.uint32).max()) >= self.vocab_size:
                wrong = int(ids.max()) if int(ids.min()) >= 0 else int(ids.min())
                raise RowError(
                    f"token id {wrong} in the data: the model has ids from 0 to {self.vocab_size - 1};"
                    " make the shards with the model's tokenizer",
                    place,
                )


def train_steps(
    index: ShardIndex,
    share: BatchShare,
    *,
    seed: int,
    shuffle: bool,
    cursor: Cursor,
    ahead: bool,
    parts: Parts | None = None,
) -> Iterator[Step]:
    """The steps of a run from `cursor` on, epoch after epoch, without end.

    Args:
        index: of this node's part of the data.
        share: of that part.
        seed, shuffle: of the order.
        cursor: rows consumed of all parts.
        ahead: whether a window is read while the one before is used.
        parts: where nodes have parts of their own.
    """
    if parts is None:
        parts = Parts(rows=(index.num_rows,), batch=(share.global_batch,))
    epoch, taken = cursor.epoch, parts.taken_after(cursor.rows)
    while True:
        order = index.order(seed=seed, epoch=epoch, shuffle=shuffle)
        batches = share.global_batches(index, order, taken[parts.mine], ahead=ahead)
        while sum(taken) < sum(parts.rows):
            batch = next(batches)
            then = parts.next(taken) if share.budget is None else (taken[0] + len(batch),)
            try:
                yield share.step_of(batch, Cursor(epoch=epoch, rows=sum(taken)), rows_everywhere=sum(then) - sum(taken))
            except RowError as error:
                first = taken[parts.mine]
                number = batch.numbers[error.place] if isinstance(batch, Grouped) else first + error.place
                raise UserError(f"{index.locate(order, number)}: {error}") from None
            taken = then
        epoch, taken = epoch + 1, parts.taken_after(0)


def eval_micro_batches(num_rows: int, share: BatchShare) -> list[int]:
    """How many micro-batches each step of an evaluation has, so that the last one holds little filling."""
    steps, rest = divmod(num_rows, share.global_batch)
    last = -(-rest // (share.micro_batch * share.data_size))
    return [share.accumulation] * steps + ([last] if last else [])


def eval_steps(index: ShardIndex, share: BatchShare) -> Iterator[Step]:
    """Every row of a data set once, in the order of its files; the shapes are those of `eval_micro_batches`."""
    order = index.order(seed=0, epoch=0, shuffle=False)
    rows = read_rows(index, order, 0, ahead=False)
    consumed = 0
    for count in eval_micro_batches(order.num_rows, share):
        smaller = dataclasses.replace(share, accumulation=count)
        batch = list(itertools.islice(rows, smaller.global_batch))
        try:
            yield smaller.step_of(batch, Cursor(rows=consumed))
        except RowError as error:
            raise UserError(f"{index.locate(order, consumed + error.place)}: {error}") from None
        consumed += len(batch)


class ReadAhead:
    """Runs an iterator in a thread, up to `depth` items ahead; an error appears where its item would have been."""

    def __init__(self, items: Iterator[Any], depth: int = 2) -> None:
        self._queue: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._fill, args=(items,), name="read-ahead", daemon=True)
        self._thread.start()

    def _fill(self, items: Iterator[Any]) -> None:
        try:
            for item in items:
                if not self._put((item, None)):
                    return
            self._put((None, StopIteration()))
        except BaseException as error:  # handed to the consumer
            self._put((None, error))

    def _put(self, item: tuple[Any, BaseException | None]) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> "ReadAhead":
        return self

    def __next__(self) -> Any:
        if self._error is not None:  # an iterator that has ended stays at its end
            raise self._error
        item, self._error = self._queue.get()
        if self._error is not None:
            self._stop.set()
            raise self._error
        return item

    def close(self) -> None:
        """Stop the thread."""
        self._stop.set()
        self._thread.join(timeout=5)
