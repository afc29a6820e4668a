"""Rows thrown into buckets by where they must go, kept in memory or on disk, and handed back in order.

`Scatter` is one worker's side: it takes batches with the final position of every row, and keeps each row in the bucket
of its position. Past its memory allowance it appends what it holds to scratch files, one a bucket. `Bucket` joins what
all workers kept for one bucket and yields the rows sorted by position.

Cost: one copy of the rows going in (one `take` a batch, sorted by bucket, so a bucket's share is a slice), two copies
coming out, and what goes to disk written and read once, through lz4 where asked for. No Python object per row.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from jllm import atomic
from jllm.data.dataset.columns import from_array, to_array

POSITION = "_position"
Positions = NDArray[np.integer]


class Scatter:
    """One worker's rows by bucket.

    Args:
        bounds: the first position of every bucket, ascending; the last bucket is open-ended.
        wanted: for each bucket, whether its rows are needed; the others are dropped.
        allowance: bytes of rows to hold in memory before appending them to disk.
        scratch: where the files go; `worker` tells this worker's files from others'.
        compressed: whether the files are worth lz4, which costs more time than all else here.
    """

    def __init__(
        self,
        *,
        bounds: Positions,
        wanted: NDArray[np.bool_],
        allowance: int,
        scratch: Path,
        worker: int,
        compressed: bool,
    ) -> None:
        self._options = pa.ipc.IpcWriteOptions(compression="lz4" if compressed else None, use_threads=False)
        self._bounds = bounds
        self._wanted = wanted
        self._allowance = allowance
        self._scratch = scratch
        self._worker = worker
        self._held = 0
        self.slices: dict[int, list[pa.RecordBatch]] = {}
        self.files: dict[int, Path] = {}

    def add(self, batch: pa.RecordBatch, positions: Positions, picks: Positions | None = None) -> None:
        """Keep rows of `batch`: row i, or row `picks[i]` where given, goes to `positions[i]` of the output."""
        bucket = np.searchsorted(self._bounds, positions, side="right") - 1
        order = np.argsort(bucket, kind="stable")
        if not self._wanted.all():
            order = order[self._wanted[bucket[order]]]
        if not len(order):
            return
        bucket = bucket[order]
        taken = batch.take(to_array(order if picks is None else picks[order]))
        full = pa.RecordBatch.from_arrays(
            [*taken.columns, to_array(positions[order])], names=[*batch.schema.names, POSITION]
        )
        starts = np.flatnonzero(np.diff(bucket, prepend=-1))
        for start, end in zip(starts, np.append(starts[1:], len(bucket)), strict=True):
            self.slices.setdefault(int(bucket[start]), []).append(full.slice(start, end - start))
        self._held += full.nbytes
        if self._held > self._allowance:
            self.spill()

    def spill(self) -> None:
        """Move everything held in memory to the scratch files."""
        for bucket, slices in self.slices.items():
            path = self.files.setdefault(bucket, self._scratch / f"{bucket:05d}-{self._worker:03d}.arrows")
            # Each spill appends one Arrow stream, so that no file stays open however many buckets there are.
            with (
                atomic.naming(path),
                path.open("ab") as file,
                pa.ipc.new_stream(file, slices[0].schema, options=self._options) as stream,
            ):
                for rows in slices:
                    stream.write_batch(rows)
        self.slices = {}
        self._held = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bucket:
    """One bucket's rows from all workers."""

    slices: list[pa.RecordBatch]
    files: list[Path]

    def ordered(self) -> "OrderedRows":
        """The rows by ascending position. The bucket is empty afterwards, its scratch files are for the caller."""
        for path in self.files:
            self.slices.extend(_read_streams(path))
        joined = pa.Table.from_batches(self.slices).combine_chunks().to_batches()
        assert len(joined) == 1, "more bytes in a bucket than one Arrow array can hold"
        rows = joined[0]
        self.slices.clear()
        position = from_array(rows.column(POSITION))
        order = np.argsort(position)
        return OrderedRows(rows=rows.drop_columns([POSITION]), order=order, positions=position[order])


@dataclasses.dataclass(frozen=True, kw_only=True)
class OrderedRows:
    """Rows and the order to read them in."""

    rows: pa.RecordBatch
    order: Positions
    positions: Positions

    def between(self, low: int, high: int, *, rows_at_once: int) -> Iterator[pa.RecordBatch]:
        """The rows at positions in [low, high), in order, a batch at a time."""
        first, last = np.searchsorted(self.positions, [low, high])
        for start in range(int(first), int(last), rows_at_once):
            yield self.rows.take(to_array(self.order[start : min(start + rows_at_once, int(last))]))


def _read_streams(path: Path) -> Iterator[pa.RecordBatch]:
    with pa.OSFile(str(path)) as file:
        size = file.size()
        while file.tell() < size:
            yield from pa.ipc.open_stream(file)
