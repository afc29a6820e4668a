"""The two passes of a shuffle: rows into buckets, buckets into blocks. See `data_set.py` for what they add up to."""

import concurrent.futures
import contextlib
import dataclasses
import itertools
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from jllm import atomic
from jllm.data.dataset.columns import conform, schema
from jllm.data.dataset.files import ROW_GROUP_TOKENS, file_name, sha256_of
from jllm.data.dataset.manifest import OTHER_CONTENT, DataSet, FileEntry, entry_of_written, restore
from jllm.data.dataset.reader import ShardReader
from jllm.data.dataset.shards import ShardWriter
from jllm.data.shuffle.compact import Compact
from jllm.data.shuffle.layout import ShuffleLayout, Unit, block_edges, destinations, lay_out
from jllm.data.shuffle.mix import Copies
from jllm.data.shuffle.scatter import Bucket, OrderedRows, Positions, Scatter
from jllm.data.shuffle.survey import survey
from jllm.forks import results_of
from jllm.guards import notation
from jllm.guards.typed import MALFORMED, check_fields
from jllm.machine import require_disk

CODEC = "zstd"
SCRATCH_NAME = ".scratch"
SCRATCH_SHARE = 2.7
"""Scratch files are compressed where they would exceed this multiple of the input's size."""
MAX_BUCKET = 512 << 20
"""Bytes of rows in a bucket: far below the 2^31 elements that an Arrow list column can address."""
MIN_BUCKET = 4 << 20
WORKER_BYTES, OWN_BYTES = 64 << 20, 24 << 20
"""The least of the cap for each worker that is a process, and how much of that is its own, not for rows."""
MOST_THREADS = 2
"""More workers than these are processes: they would wait for the interpreter lock."""
Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resources:
    """What a command may use: `cores` workers and `memory` bytes, the interpreter's own 100-200 MiB not counted."""

    cores: int
    memory: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class _InputGroup:
    """A row group to scatter: the number of its first row in the input, and of its first taken row in the output."""

    path: Path
    group: int
    first_row: int
    first_taken: int


class Passes:
    """The two passes over one data set."""

    def __init__(
        self,
        data_set: DataSet,
        folder: Path,
        *,
        blocks: int,
        seed: int,
        resources: Resources,
        copies: Copies | None,
    ) -> None:
        self.folder = folder
        self.blocks = blocks
        self.resources = resources
        self.scratch = folder / SCRATCH_NAME
        found = survey(data_set, cores=resources.cores)
        self.shards = found.shards
        self.columns = found.columns
        self.further = found.further
        self.compact = Compact(columns=found.packed, schema=schema(found.columns, found.further.carried))
        self.copies = copies
        self.rows = data_set.manifest.rows if copies is None else int(copies.sum())
        self.raw_bytes = max(1, found.packed_size * self.rows // max(1, data_set.manifest.rows))
        self.positions = destinations(self.rows, fingerprint=data_set.manifest.fingerprint, seed=seed)
        self.edges = block_edges(self.rows, blocks)
        self.checksums = {data_set.folder / entry.path: entry.sha256 for entry in data_set.manifest.files}
        self.input_bytes = sum(entry.bytes for entry in data_set.manifest.files)
        kept = {block: self._read_entry(block) for block in range(blocks)}
        self.entries: dict[int, FileEntry] = {block: entry for block, entry in kept.items() if entry is not None}
        self._stop = threading.Event()

    def run(self) -> int:
        """Write the blocks that are missing; how many were there."""
        kept = len(self.entries)
        if kept < self.blocks:
            layout = self._layout()
            shutil.rmtree(self.scratch, ignore_errors=True)
            self.scratch.mkdir()
            buckets = self._scatter_all(layout)
            self._gather_all(layout, buckets)
        return kept

    @property
    def _in_memory(self) -> bool:
        return self.raw_bytes * 5 // 4 + 3 * MIN_BUCKET * self.resources.cores <= self.resources.memory

    def check_disk(self) -> None:
        """Make sure that scratch and output fit.

        Raises:
            UserError: they do not.
        """
        missing = 1 - len(self.entries) / self.blocks
        needed = self.input_bytes * missing * 1.1 + (1 << 20)
        if not self._in_memory:
            needed += min(self.raw_bytes, self.input_bytes * SCRATCH_SHARE) * missing
        require_disk(self.folder, int(needed), f"shuffling {self.folder.name}")

    def _layout(self) -> ShuffleLayout:
        # A bucket in work takes twice its size: its slices, and the same rows joined. A third is for the writers.
        room = self._memory // (3 * self._workers)
        size = min(MAX_BUCKET, max(room, MIN_BUCKET), max(MIN_BUCKET, self.raw_bytes // (4 * self._workers)))
        return lay_out(self.edges, max(1, self.rows * size // self.raw_bytes))

    def _run(self, workers: int, work: Callable[[Any], Any], tasks: Iterable[Any], last: Any = None) -> list[Any]:
        """The results of all tasks; the first failure stops the others and is raised."""
        try:
            return results_of(workers, work, tasks, last=last, threads=self._in_memory or workers <= MOST_THREADS)
        except BaseException:
            self._stop.set()
            raise

    @property
    def _workers(self) -> int:
        """Workers of each pass: no more than can hold rows enough that a bucket's share of them is worth a write."""
        cores = self.resources.cores
        return cores if self._in_memory else min(cores, max(MOST_THREADS, self.resources.memory // WORKER_BYTES))

    @property
    def _memory(self) -> int:
        """What of the cap is for rows."""
        own = 0 if self._in_memory or self._workers <= MOST_THREADS else OWN_BYTES * self._workers
        return self.resources.memory - own

    def _scatter_all(self, layout: ShuffleLayout) -> list[Bucket]:
        wanted = np.zeros(len(layout.bounds), dtype=bool)
        for unit in layout.units:
            if any(block not in self.entries for block in unit.blocks):
                wanted[unit.buckets.start : unit.buckets.stop] = True
        workers = self._workers
        allowance = 1 << 62 if self._in_memory else self._memory // (2 * workers)
        mine = threading.local()  # of this worker, be it a thread or a process

        def work(task: _InputGroup | Path | str) -> Any:
            if isinstance(task, Path):
                if sha256_of(task) != self.checksums[task]:
                    raise restore(f"{task}{OTHER_CONTENT}")
                return None
            if not hasattr(mine, "scatter"):
                mine.reader = None
                mine.scatter = Scatter(
                    bounds=layout.bounds,
                    wanted=wanted,
                    allowance=allowance,
                    scratch=self.scratch,
                    worker=threading.get_native_id(),
                    compressed=self.raw_bytes > SCRATCH_SHARE * self.input_bytes,
                )
            scatter: Scatter = mine.scatter
            if isinstance(task, str):
                if not self._in_memory:
                    scatter.spill()
                return scatter.slices, scatter.files
            if mine.reader is None or mine.reader.path != task.path:
                mine.reader = ShardReader(task.path, columns=self.compact.schema.names)
            self._scatter_group(scatter, mine.reader, task)
            return None

        # Of what others wrote no checksum is known.
        checked = [shard.path for shard in self.shards if self.checksums[shard.path] is not None]
        tasks = itertools.chain(checked, self._groups())
        found = [each for each in self._run(workers, work, tasks, last="end") if each is not None]
        del self.positions  # the second pass has its memory for the buckets
        return [
            Bucket(
                slices=[rows for slices, _ in found for rows in slices.pop(bucket, [])],
                files=[files[bucket] for _, files in found if bucket in files],
            )
            for bucket in range(len(layout.bounds))
        ]

    def _groups(self) -> Iterator["_InputGroup"]:
        taken = 0
        for shard in self.shards:
            row = shard.first_row
            for group, rows in enumerate(shard.rows_of_groups):
                yield _InputGroup(path=shard.path, group=group, first_row=row, first_taken=taken)
                taken += rows if self.copies is None else int(self.copies[row : row + rows].sum())
                row += rows

    def _scatter_group(self, scatter: Scatter, reader: ShardReader, task: "_InputGroup") -> None:
        row, taken = task.first_row, task.first_taken
        for batch in reader.batches(task.group):
            picks: Positions | None = None
            count = batch.num_rows
            if self.copies is not None:
                picks = np.repeat(np.arange(batch.num_rows), self.copies[row : row + batch.num_rows])
                count = len(picks)
            packed = self.compact.pack(conform(batch, self.columns, self.further.carried))
            scatter.add(packed, self.positions[taken : taken + count], picks)
            row += batch.num_rows
            taken += count

    def _gather_all(self, layout: ShuffleLayout, buckets: list[Bucket]) -> None:
        workers = min(self._workers, len(layout.units))

        def work(unit: Unit) -> dict[int, FileEntry]:
            self._gather(unit, layout, buckets)
            return {block: self.entries[block] for block in unit.blocks if block in self.entries}

        for entries in self._run(workers, work, layout.units):
            self.entries |= entries

    def _gather(self, unit: Unit, layout: ShuffleLayout, buckets: list[Bucket]) -> None:
        # Cores are idle where there are few blocks: let them prepare the next bucket, and compress pages.
        spare = self.resources.cores // len(layout.units)
        rows = _UnitRows(
            unit, layout, buckets, rows_at_once=self._rows_at_once, ahead=len(layout.units) < self.resources.cores
        )
        with contextlib.ExitStack() as stack:
            pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(spare)) if spare > 1 else None
            self._write_blocks(unit, rows, pool)

    def _write_blocks(self, unit: Unit, rows: "_UnitRows", pool: concurrent.futures.Executor | None) -> None:
        for block in unit.blocks:
            if block in self.entries or self._stop.is_set():
                continue
            with self._writer(block, pool) as writer:
                for batch in rows.between(self.edges[block], self.edges[block + 1]):
                    writer.write(self.compact.unpack(batch))
            entry = entry_of_written(self._path(block), self.folder, writer.statistics)
            atomic.write_json(self._entry_path(block), dataclasses.asdict(entry))
            self.entries[block] = entry

    def _writer(self, block: int, pool: concurrent.futures.Executor | None) -> ShardWriter:
        further = self.further.carried
        return ShardWriter(self._path(block), columns=self.columns, further=further, codec=CODEC, pool=pool)

    @property
    def _rows_at_once(self) -> int:
        """About a row group's worth."""
        return max(1, ROW_GROUP_TOKENS * self.compact.columns[0].bytes * self.rows // self.raw_bytes)

    def _path(self, block: int) -> Path:
        return self.folder / file_name(self.folder.name, block, CODEC)

    def _entry_path(self, block: int) -> Path:
        return self.folder / f".{self._path(block).name}.json"

    def _read_entry(self, block: int) -> FileEntry | None:
        """The entry of a block that an earlier run finished."""
        try:
            entry = FileEntry(**notation.read_json(self._entry_path(block)))
            check_fields(entry)
        except FileNotFoundError:
            return None
        except MALFORMED:  # it is made again
            return None
        if entry.path != self._path(block).relative_to(self.folder).as_posix():
            return None
        return entry if self._path(block).is_file() and self._path(block).stat().st_size == entry.bytes else None


class _UnitRows:
    """The rows of a unit's buckets in order of position, one bucket in memory at a time, or two with `ahead`."""

    def __init__(
        self, unit: Unit, layout: ShuffleLayout, buckets: list[Bucket], *, rows_at_once: int, ahead: bool
    ) -> None:
        self._bounds = layout.bounds
        self._buckets = buckets
        self._rows_at_once = rows_at_once
        self._ordered = in_background(self._load_all(unit)) if ahead else self._load_all(unit)
        self._held: OrderedRows | None = None
        self._end = -1

    def between(self, low: int, high: int) -> Iterator[pa.RecordBatch]:
        """The rows at positions in [low, high); the ranges of successive calls ascend."""
        while low < high:
            if self._end <= low:
                self._held = None  # let go of the rows before the next ones come
                self._held, self._end = next(self._ordered)
            assert self._held is not None
            end = min(high, self._end)
            yield from self._held.between(low, end, rows_at_once=self._rows_at_once)
            low = end

    def _load_all(self, unit: Unit) -> Iterator[tuple[OrderedRows, int]]:
        for index in unit.buckets:
            end = int(self._bounds[index + 1]) if index + 1 < len(self._bounds) else 1 << 62
            bucket, self._buckets[index] = self._buckets[index], Bucket(slices=[], files=[])
            rows = bucket.ordered()
            for path in bucket.files:
                path.unlink()
            yield rows, end


def in_background(items: Iterator[Item]) -> Iterator[Item]:
    """The same items, each prepared in a thread while the one before is in use."""
    pool = concurrent.futures.ThreadPoolExecutor(1)
    try:
        end = object()
        following = pool.submit(next, items, end)
        while (item := following.result()) is not end:
            following = pool.submit(next, items, end)
            yield item  # type: ignore[misc]
    finally:  # which the thread itself may come to, after an error elsewhere: it cannot wait for itself
        pool.shutdown(wait=False, cancel_futures=True)
