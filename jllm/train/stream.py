"""Shards → micro-batches, and the cursor.

Exactly one process of a pipeline reads: the first stage's. Rows come in the order of `jllm.data.order`; the rows of a
global batch are fixed by that order alone, then dealt to the data-parallel pipelines in equal runs. The only state is
the number of rows consumed. A last global batch that is short is filled with fully masked rows: no row is trained
twice, none is dropped.

The label shift happens here and nowhere else: a row of n tokens becomes n - 1 inputs and n - 1 targets. The first
token of a document is never a target, nor is padding.

Cost: two windows of row groups in memory (one in use, one read ahead), `WINDOW_BYTES` each, and the micro-batches of
two steps. Nothing grows with the data set but 32 bytes for each row group.
"""

import dataclasses
import itertools
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from jllm.data.manifest import DataSet
from jllm.data.order import EpochOrder, epoch_order
from jllm.data.shards import CU_SEQLENS, IGNORE_INDEX, INPUT_IDS, LABELS, Int32, Int64, ShardReader, from_list_array
from jllm.errors import UserError

WINDOW_BYTES = 32 << 20
LENGTH_MULTIPLE = 64
"""Micro-batches are padded to a multiple of this (or to `--seq_len`), so that few shapes occur."""

_NUMBERS_AT_ONCE = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cursor:
    """Where a run stands in its data: the epoch, and the rows of it that are consumed, over all pipelines."""

    epoch: int = 0
    rows: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What enters the pipeline at once.

    Attributes:
        input_ids: [B, S] int64.
        integers: [2, B, S] int64: targets (shifted, `IGNORE_INDEX` where not trained on), and position ids.
    """

    input_ids: Tensor
    integers: Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One pipeline's share of a global batch.

    Attributes:
        micro_batches: all of one shape [B, S].
        rows: rows of the whole global batch that are not filling, over all pipelines.
        tokens: inputs of this share that are not padding.
        trained_tokens: targets of this share.
        length: S.
        start: the cursor before the step.
    """

    micro_batches: list[MicroBatch]
    rows: int
    tokens: int
    trained_tokens: int
    length: int
    start: Cursor


@dataclasses.dataclass(slots=True)  # not frozen, which would make it three times slower to make
class Row:
    """One row as it is on disk: ids, labels (None: all trained), document boundaries (None: one document)."""

    ids: Int32
    labels: Int32 | None
    boundaries: Int32 | None

    @property
    def real_length(self) -> int:
        return len(self.ids) if self.boundaries is None else int(self.boundaries[-1])


class ShardIndex:
    """The row groups of a data set: how many rows each has, how large it is, and how to read it."""

    def __init__(self, data_set: DataSet) -> None:
        self.data_set = data_set
        self.fingerprint = data_set.manifest.fingerprint
        self._locations: list[tuple[int, int]] = []
        rows, sizes = [], []
        for number, path in enumerate(data_set.paths):
            reader = ShardReader(path)
            for group in range(reader.metadata.num_row_groups):
                facts = reader.metadata.row_group(group)
                if facts.num_rows:
                    self._locations.append((number, group))
                    rows.append(facts.num_rows)
                    sizes.append(4 * sum(facts.column(i).num_values for i in range(facts.num_columns)))
            reader.close()
        self.rows = np.array(rows, dtype=np.int64)
        self.sizes = np.array(sizes, dtype=np.int64)

    @property
    def num_rows(self) -> int:
        return int(self.rows.sum())

    def order(self, *, seed: int, epoch: int, shuffle: bool) -> EpochOrder:
        """The order of one epoch."""
        return epoch_order(
            self.rows,
            self.sizes,
            fingerprint=self.fingerprint,
            seed=seed,
            epoch=epoch,
            shuffle=shuffle,
            window_bytes=WINDOW_BYTES,
        )

    def read_window(self, order: EpochOrder, window: int) -> list[pa.RecordBatch]:
        """The row groups of a window, in the order in which its rows are numbered."""
        batches = []
        for group in order.groups_of_window(window).tolist():
            number, row_group = self._locations[group]
            reader = ShardReader(self.data_set.paths[number])
            batches.append(reader.read_group(row_group))
            reader.close()
        return batches


class Window:
    """The rows of one window, addressed by their number in it."""

    def __init__(self, batches: list[pa.RecordBatch]) -> None:
        self._starts = np.concatenate([[0], np.cumsum([batch.num_rows for batch in batches])])
        self._columns = [
            tuple(
                from_list_array(batch.column(name)) if name in batch.schema.names else None
                for name in (INPUT_IDS, LABELS, CU_SEQLENS)
            )
            for batch in batches
        ]

    def rows(self, numbers: Int64) -> Iterator[Row]:
        """The rows of these numbers, in this order."""
        for at in range(0, len(numbers), _NUMBERS_AT_ONCE):
            some = numbers[at : at + _NUMBERS_AT_ONCE]
            batches = np.searchsorted(self._starts, some, side="right") - 1
            within = some - self._starts[batches]
            for batch, index in zip(batches.tolist(), within.tolist(), strict=True):
                ids, labels, boundaries = (_list_at(column, index) for column in self._columns[batch])
                assert ids is not None
                yield Row(ids=ids, labels=labels, boundaries=boundaries)


def _list_at(column: tuple[Int32, Int64] | None, index: int) -> Int32 | None:
    if column is None:
        return None
    values, offsets = column
    return values[offsets[index] : offsets[index + 1]]


def read_rows(index: ShardIndex, order: EpochOrder, start: int, *, ahead: bool) -> Iterator[Row]:
    """The rows of an epoch from number `start` on; with `ahead`, the next window is read while this one is used."""
    if start >= order.num_rows:
        return
    window, skip = order.find(start)
    with ThreadPoolExecutor(max_workers=1) as pool:
        pending: Future[list[pa.RecordBatch]] | None = None
        while window < order.num_windows:
            batches = pending.result() if pending else index.read_window(order, window)
            pending = None
            if ahead and window + 1 < order.num_windows:
                pending = pool.submit(index.read_window, order, window + 1)
            rows = Window(batches)
            del batches
            yield from rows.rows(order.rows_of_window(window)[skip:])
            window, skip = window + 1, 0


def collate(rows: list[Row | None], length: int, *, micro_batch: int, block_mask: bool) -> list[MicroBatch]:
    """Rows → micro-batches of inputs [micro_batch, length]; None is a filling row, fully masked.

    All micro-batches of a step are made at once, so that the cost of numpy's calls is paid once for a step.
    """
    shape = (len(rows) // micro_batch, micro_batch, length)
    input_ids = np.empty(shape, dtype=np.int64)
    integers = np.empty((shape[0], 2, *shape[1:]), dtype=np.int64)
    for place, row in enumerate(rows):
        number, within = divmod(place, micro_batch)
        inputs = trained = 0
        if row is not None and len(row.ids) > 1:
            inputs, trained = len(row.ids) - 1, max(row.real_length - 1, 0)
            input_ids[number, within, :inputs] = row.ids[:-1]
            integers[number, 0, within, :trained] = (row.ids if row.labels is None else row.labels)[1 : trained + 1]
        input_ids[number, within, inputs:] = 0
        integers[number, 0, within, trained:] = IGNORE_INDEX
    row_of, starts = _document_starts(rows, length)
    later = starts > 0
    batch_of, place_of = np.divmod(row_of[later], micro_batch)
    integers[batch_of, 0, place_of, starts[later] - 1] = IGNORE_INDEX
    positions = np.arange(input_ids.size).reshape(shape)
    if block_mask:
        # Each position less the start of its document; padding continues the last document.
        edges = np.append(row_of * length + starts, input_ids.size)
        np.subtract(positions, np.repeat(edges[:-1], edges[1:] - edges[:-1]).reshape(shape), out=integers[:, 1])
    else:
        integers[:, 1] = positions[0, 0]
    return [
        MicroBatch(input_ids=torch.from_numpy(ids), integers=torch.from_numpy(rest))
        for ids, rest in zip(input_ids, integers, strict=True)
    ]


def _document_starts(rows: list[Row | None], length: int) -> tuple[Int64, Int64]:
    """For each document of a batch, in order: its row, and where in the row it starts.

    Every row has a document at 0, also if it is empty. A start at `length`, just beyond the inputs, is there too: the
    last token of a row as long as it may be is a target and never an input.
    """
    one = np.zeros(1, dtype=np.int32)
    parts = [
        one if row is None or row.boundaries is None or len(row.boundaries) < 2 else row.boundaries[:-1] for row in rows
    ]
    starts = np.concatenate(parts)
    row_of = np.repeat(np.arange(len(rows)), [len(part) for part in parts])
    kept = starts <= length  # an empty document at the very end starts beyond
    return row_of[kept], starts[kept].astype(np.int64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
    """Which rows of a global batch one pipeline takes, and in what shape.

    Attributes:
        micro_batch: rows of a micro-batch.
        accumulation: micro-batches of a step.
        data_rank, data_size: which of how many pipelines.
        seq_len: the longest input allowed; None: whatever the rows need.
        block_mask: position ids restart at each document.
        vocab_size: ids must be below.
    """

    micro_batch: int
    accumulation: int
    data_rank: int
    data_size: int
    seq_len: int | None
    block_mask: bool
    vocab_size: int

    @property
    def global_batch(self) -> int:
        return self.micro_batch * self.accumulation * self.data_size

    def step_of(self, rows: list[Row], start: Cursor) -> Step:
        """This pipeline's step out of a global batch of at most `global_batch` rows."""
        mine_size = self.micro_batch * self.accumulation
        mine = rows[self.data_rank * mine_size : (self.data_rank + 1) * mine_size]
        needed = max((len(row.ids) for row in rows), default=2) - 1
        if self.seq_len is not None and needed > self.seq_len:
            raise UserError(
                f"--seq_len {self.seq_len}: a row has {needed + 1} tokens, which needs {needed}; raise it, or make"
                f" shards with --max_len {self.seq_len + 1}"
            )
        for row in mine:
            # As unsigned numbers negative ids are the largest.
            if len(row.ids) and int(row.ids.view(np.uint32).max()) >= self.vocab_size:
                wrong = int(row.ids.max()) if int(row.ids.min()) >= 0 else int(row.ids.min())
                raise UserError(
                    f"token id {wrong} in the data: the model has ids from 0 to {self.vocab_size - 1};"
                    " make the shards with the model's tokenizer"
                )
        length = -(-max(needed, 1) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        if self.seq_len is not None:
            length = min(length, self.seq_len)
        filled: list[Row | None] = [*mine, *([None] * (mine_size - len(mine)))]
        micro_batches = collate(filled, length, micro_batch=self.micro_batch, block_mask=self.block_mask)
        return Step(
            micro_batches=micro_batches,
            rows=len(rows),
            tokens=sum(max(min(row.real_length, len(row.ids)) - 1, 0) for row in mine),
            trained_tokens=sum(
                int(np.count_nonzero(batch.integers[0].numpy() != IGNORE_INDEX)) for batch in micro_batches
            ),
            length=length,
            start=start,
        )


def train_steps(
    index: ShardIndex, share: Share, *, seed: int, shuffle: bool, cursor: Cursor, ahead: bool
) -> Iterator[Step]:
    """The steps of a run from `cursor` on, epoch after epoch, without end."""
    epoch, consumed = cursor.epoch, cursor.rows
    while True:
        order = index.order(seed=seed, epoch=epoch, shuffle=shuffle)
        rows = read_rows(index, order, consumed, ahead=ahead)
        while consumed < order.num_rows:
            batch = list(itertools.islice(rows, share.global_batch))
            yield share.step_of(batch, Cursor(epoch=epoch, rows=consumed))
            consumed += len(batch)
        epoch, consumed = epoch + 1, 0


def eval_micro_batches(num_rows: int, share: Share) -> list[int]:
    """How many micro-batches each step of an evaluation has, so that the last one holds little filling."""
    steps, rest = divmod(num_rows, share.global_batch)
    last = -(-rest // (share.micro_batch * share.data_size))
    return [share.accumulation] * steps + ([last] if last else [])


def eval_steps(index: ShardIndex, share: Share) -> Iterator[Step]:
    """Every row of a data set once, in the order of its files; the shapes are those of `eval_micro_batches`."""
    order = index.order(seed=0, epoch=0, shuffle=False)
    rows = read_rows(index, order, 0, ahead=False)
    consumed = 0
    for count in eval_micro_batches(order.num_rows, share):
        smaller = dataclasses.replace(share, accumulation=count)
        batch = list(itertools.islice(rows, smaller.global_batch))
        yield smaller.step_of(batch, Cursor(rows=consumed))
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
