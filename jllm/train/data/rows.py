"""The rows of one or several data sets, in the order of an epoch, through a window of row groups in memory.

`ShardIndex` knows where every row group lies; `read_rows` yields rows from any place of an epoch on. Several data sets
are one here: the row groups of all of them are ordered together, those of a set of weight 2.5 twice, and of each a
seeded half, another one in every epoch, a third time. Rows mix within a window; `jllm shuffle --mix` mixes globally.

A row group too large to be held at once (Spark's are, by default) is read in pieces, one after another.

Cost: two windows in memory (one in use, one read ahead), `WINDOW_BYTES` each, and 64 bytes for each row group. A seek
reads one window, and of a row group that is read in pieces those before.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from jllm.data.dataset.columns import COLUMNS, CONTROL_CLASS, REF_LABELS, REF_LOGPS, from_array, to_array
from jllm.data.dataset.manifest import DataSet
from jllm.data.dataset.shards import (
    CU_SEQLENS,
    IGNORE_INDEX,
    INPUT_IDS,
    LABELS,
    Int32,
    Int64,
    ShardReader,
    from_list_array,
)
from jllm.train.data.order import EpochOrder, epoch_order

WINDOW_BYTES = 32 << 20

_NUMBERS_AT_ONCE = 1024
_WHOLE = -1
_FIRST_WINDOW_THREADS = 4


@dataclasses.dataclass(slots=True)  # not frozen, which would make it three times slower to make
class Row:
    """One row as it is on disk: ids, labels (None: all trained), document boundaries (None: one document), control
    classes (None: not asked for); of preference pairs, where they are there and asked for, the documents' reference
    log-probabilities, and the checksum of the row that these were made of."""

    ids: Int32
    labels: Int32 | None
    boundaries: Int32 | None
    classes: Int32 | None = None
    references: NDArray[np.float32] | None = None
    checksum: int | None = None

    @property
    def real_length(self) -> int:
        return len(self.ids) if self.boundaries is None else int(self.boundaries[-1])


def without_padding(row: Row) -> Row:
    """The row without what lies behind its last document."""
    if row.boundaries is None or (end := row.real_length) == len(row.ids):
        return row
    labels = None if row.labels is None else row.labels[:end]
    return dataclasses.replace(row, ids=row.ids[:end], labels=labels)


def joined(rows: Sequence[Row], *, trims: bool = False) -> Row:
    """Rows one behind the other as one, each of them a document of it at least; padding becomes one that is masked, or
    with `trims` nothing."""
    if len(rows) == 1:
        return rows[0]
    if trims:
        rows = [without_padding(row) for row in rows]
    ids = np.concatenate([row.ids for row in rows])
    labels = np.concatenate([row.ids if row.labels is None else row.labels for row in rows])
    boundaries, start = [np.zeros(1, dtype=np.int32)], 0
    for row in rows:
        size = len(row.ids)
        given = row.boundaries[1:] if row.boundaries is not None else np.empty(0, dtype=np.int32)
        boundaries.append(given + start)
        if not len(given) or given[-1] < size:
            boundaries.append(np.array([start + size], dtype=np.int32))
        if row.boundaries is not None and row.real_length < size:
            labels[start + row.real_length : start + size] = IGNORE_INDEX
        start += size
    return Row(
        ids=ids,
        labels=labels,
        boundaries=np.concatenate(boundaries).astype(np.int32),
        classes=None if rows[0].classes is None else np.concatenate([row.classes for row in rows]),  # type: ignore[misc]
        references=None if rows[0].references is None else np.concatenate([row.references for row in rows]),  # type: ignore[misc]
    )


class ShardIndex:
    """The row groups of data sets: how many rows each has, how large it is, and how to read it.

    An entry is a row group, or a piece of one that is too large to be held at once.

    Args:
        data_sets: in the order that `--no_shuf` reads them in.
        weights: how often an epoch has the rows of each set; None: once.
        further: columns that are read beside those of the contract.

    Attributes:
        rows: [E] rows that an epoch takes of each entry.
        sizes: [E] bytes of these in memory.
        fingerprint: of the sets and their weights; a single set of weight 1 has its own.
    """

    def __init__(
        self, *data_sets: DataSet, weights: Sequence[float] | None = None, further: Sequence[str] = ()
    ) -> None:
        self._names = (*COLUMNS, *further)
        weights = weights or [1.0] * len(data_sets)
        self._paths = [path for data_set in data_sets for path in data_set.paths]
        fingerprints = [data_set.manifest.fingerprint for data_set in data_sets]
        self.fingerprint = fingerprints[0]
        if len(data_sets) > 1 or weights[0] != 1:
            named = json.dumps([list(pair) for pair in zip(fingerprints, map(float, weights), strict=True)])
            self.fingerprint = hashlib.sha256(named.encode()).hexdigest()
        tables: list[Int64] = []
        file = 0
        for data_set, weight in zip(data_sets, weights, strict=True):
            entries = [entry for number in range(len(data_set.paths)) for entry in self._entries_of_file(file + number)]
            file += len(data_set.paths)
            tables.extend(_weighted(np.array(entries, dtype=np.int64).reshape(-1, 6), weight))
        table = np.concatenate(tables)
        table = table[table[:, -1] > 0]
        self._locations, self._first, self._all_rows, self.rows = table[:, :3], table[:, 3], table[:, 4], table[:, 6]
        self.sizes = table[:, 5] * self.rows // self._all_rows
        # Pieces of one row group stay together; the numbers of a file, a row group or a piece start over at the next.
        new = np.any(np.diff(table[:, :2], axis=0, prepend=-1) != 0, axis=1) | (np.diff(table[:, 2], prepend=-1) <= 0)
        self._pieces = np.diff(np.append(np.flatnonzero(new), len(table)))
        self._open: tuple[tuple[int, int, int], Iterator[pa.RecordBatch]] | None = None

    def _entries_of_file(self, file: int) -> Iterator[tuple[int, int, int, int, int, int]]:
        """File, row group, piece (`_WHOLE`: not in pieces), first row of the piece, its rows, their bytes."""
        reader = ShardReader(self._paths[file])
        for group in range(reader.metadata.num_row_groups):
            facts = reader.metadata.row_group(group)
            size = 4 * sum(facts.column(i).num_values for i in range(facts.num_columns))
            at_once = reader.rows_at_once(group)
            for piece, start in enumerate(range(0, facts.num_rows, at_once)):
                rows = min(at_once, facts.num_rows - start)
                number = piece if at_once < facts.num_rows else _WHOLE
                yield file, group, number, start, rows, size * rows // facts.num_rows
        reader.close()

    @property
    def num_rows(self) -> int:
        """Rows of an epoch."""
        return int(self.rows.sum())

    @property
    def mean_length(self) -> float:
        """About how many numbers a row of an epoch has, over all its columns, by the files' footers alone."""
        return int(self.sizes.sum()) / 4 / max(1, self.num_rows)

    def order(self, *, seed: int, epoch: int, shuffle: bool) -> EpochOrder:
        """The order of one epoch."""
        return epoch_order(
            self.rows,
            self.sizes,
            pieces=self._pieces,
            fingerprint=self.fingerprint,
            seed=seed,
            epoch=epoch,
            shuffle=shuffle,
            window_bytes=WINDOW_BYTES,
        )

    def read_window(
        self, order: EpochOrder, window: int, columns: Sequence[str] | None = None, *, threads: int = 1
    ) -> list[pa.RecordBatch]:
        """The rows of a window, in the order in which they are numbered; one caller at a time.

        Several threads reach row groups that lie on a disk sooner. They are not used where any is read in pieces.
        """
        entries = order.groups_of_window(window).tolist()
        if threads == 1 or any(self._locations[entries, 2] != _WHOLE):
            return [self._read_entry(order, entry, columns) for entry in entries]
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(lambda entry: self._read_entry(order, entry, columns), entries))

    def _read_entry(self, order: EpochOrder, entry: int, columns: Sequence[str] | None) -> pa.RecordBatch:
        file, group, piece = self._locations[entry].tolist()
        if piece == _WHOLE:
            reader = ShardReader(self._paths[file], columns=self._names)
            batch = reader.read_group(group, columns)
            reader.close()
        else:
            batch = self._read_piece(file, group, piece)
        assert len(batch) == self._all_rows[entry]
        chosen = self._chosen(order, entry)
        return batch if chosen is None else batch.take(to_array(chosen))

    def _read_piece(self, file: int, group: int, piece: int) -> pa.RecordBatch:
        """Go on in the row group that is open, or reach the piece from its row group's start."""
        if self._open is not None and self._open[0] == (file, group, piece):
            batches = self._open[1]
        else:
            batches = ShardReader(self._paths[file], columns=self._names).batches(group)
            for _ in range(piece):
                next(batches)
        batch = next(batches)
        self._open = ((file, group, piece + 1), batches)
        return batch

    def _chosen(self, order: EpochOrder, entry: int) -> Int64 | None:
        """Which rows of an entry an epoch takes, where that is not all."""
        count = int(self.rows[entry])
        if count == self._all_rows[entry]:
            return None
        return np.sort(order.generator(2, entry).permutation(int(self._all_rows[entry]))[:count])

    def locate(self, order: EpochOrder, number: int) -> str:
        """Where row `number` of an epoch lies, for a message."""
        window, place = order.find(number)
        entries = order.groups_of_window(window)
        within = int(order.rows_of_window(window)[place])
        starts = np.cumsum(self.rows[entries])
        at = int(np.searchsorted(starts, within, side="right"))
        entry = int(entries[at])
        within -= int(starts[at] - self.rows[entry])
        chosen = self._chosen(order, entry)
        file, group, _ = self._locations[entry].tolist()
        row = int(self._first[entry]) + (within if chosen is None else int(chosen[within]))
        return f"{self._paths[file]}: row group {group}, row {row}"


def _weighted(table: Int64, weight: float) -> Iterator[Int64]:
    """The entries of one set, as often as its weight says, with the rows taken of each as a further column."""
    whole = int(weight)
    for _ in range(whole):
        yield np.column_stack([table, table[:, 4]])
    if weight > whole:
        before = np.floor(np.concatenate([[0], np.cumsum(table[:, 4])]) * (weight - whole) + 1e-6).astype(np.int64)
        yield np.column_stack([table, np.diff(before)])


class Window:
    """The rows of one window, addressed by their number in it."""

    def __init__(self, batches: list[pa.RecordBatch]) -> None:
        self._starts = np.concatenate([[0], np.cumsum([batch.num_rows for batch in batches])])
        self._columns = [
            tuple(
                from_list_array(batch.column(name)) if name in batch.schema.names else None
                for name in (INPUT_IDS, LABELS, CU_SEQLENS, CONTROL_CLASS.name, REF_LOGPS.name)
            )
            for batch in batches
        ]
        self._checksums = [
            from_array(batch.column(REF_LABELS.name)) if REF_LABELS.name in batch.schema.names else None
            for batch in batches
        ]

    def rows(self, numbers: Int64) -> Iterator[Row]:
        """The rows of these numbers, in this order."""
        for at in range(0, len(numbers), _NUMBERS_AT_ONCE):
            some = numbers[at : at + _NUMBERS_AT_ONCE]
            batches = np.searchsorted(self._starts, some, side="right") - 1
            within = some - self._starts[batches]
            for batch, index in zip(batches.tolist(), within.tolist(), strict=True):
                ids, labels, boundaries, classes, references = (
                    _list_at(column, index) for column in self._columns[batch]
                )
                assert ids is not None
                row = Row(ids=ids, labels=labels, boundaries=boundaries, classes=classes)
                if references is not None:
                    row.references = references.view(np.float32)
                    checksums = self._checksums[batch]
                    row.checksum = None if checksums is None else int(checksums[index])
                yield row


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
            if pending is not None:
                batches = pending.result()
            else:
                batches = index.read_window(order, window, threads=_FIRST_WINDOW_THREADS if ahead else 1)
            pending = None
            if ahead and window + 1 < order.num_windows:
                pending = pool.submit(index.read_window, order, window + 1)
            rows = Window(batches)
            del batches
            yield from rows.rows(order.rows_of_window(window)[skip:])
            window, skip = window + 1, 0


def row_lengths(index: ShardIndex, order: EpochOrder) -> Int32:
    """[R] the length of every row of an epoch, in order. Reads the whole of `input_ids` once: seconds for each GB."""
    found = []
    for window in range(order.num_windows):
        batches = index.read_window(order, window, columns=[INPUT_IDS])
        lengths = np.concatenate([np.diff(from_list_array(batch.column(INPUT_IDS))[1]) for batch in batches])
        found.append(lengths[order.rows_of_window(window)].astype(np.int32))
    return np.concatenate(found) if found else np.empty(0, np.int32)
