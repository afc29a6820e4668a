"""Exact global shuffle of a data set's rows, in memory or out of core.

`shuffle_set` deals a uniform permutation of all rows to `blocks` files. Row i of the data set goes to position
`destinations(...)[i]` of the output, a pure function of the data's fingerprint, the seed and the number of rows: not of
the number of workers, of the memory cap, or of what an earlier, killed run left. Block k holds positions
`[k·rows/blocks, (k+1)·rows/blocks)`.

Two passes. The first reads every input file once, row group by row group, and throws rows into buckets, which are
ranges of positions (`scatter.py`), packed to 2 or 3 bytes a token (`compact.py`); where they exceed the cap they go
to disk. The second orders each
bucket and writes the blocks. Blocks are finished one by one: a killed run's blocks are kept and only the rows of the
others are thrown again.

Cost: every row is decoded once and encoded once, and copied three times in between; 4 bytes of memory a row for the
permutation, and the cap for everything else.
"""

import concurrent.futures
import dataclasses
import json
import queue
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from jllm import atomic
from jllm.data.compact import Compact, CompactColumn, Range, join_ranges
from jllm.data.machine import require_disk
from jllm.data.manifest import DataSet, FileEntry, Manifest, entry_of_written, read_manifest, write_manifest
from jllm.data.scatter import Bucket, OrderedRows, Positions, Scatter
from jllm.data.shards import (
    COLUMNS,
    CU_SEQLENS,
    INPUT_IDS,
    ROW_GROUP_TOKENS,
    ShardReader,
    ShardWriter,
    conform,
    file_name,
)
from jllm.errors import UserError

COMMAND = "shuffle_datasets"
CODEC = "zstd"
PLAN_NAME = ".plan.json"
SCRATCH_NAME = ".scratch"
OFFSET_BYTES = 4
SCRATCH_SHARE = 2.7
"""Scratch files are compressed where they would exceed this multiple of the input's size."""
Item = TypeVar("Item")
MAX_BUCKET = 512 << 20
"""Bytes of rows in a bucket: far below the 2^31 elements that an Arrow list column can address."""
MIN_BUCKET = 4 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resources:
    """What a command may use: `cores` workers and `memory` bytes, the interpreter's own 100-200 MiB not counted."""

    cores: int
    memory: int


def destinations(rows: int, *, fingerprint: str, seed: int) -> Positions:
    """A uniform random permutation of `range(rows)`: the output position of every input row."""
    entropy = [seed, *np.frombuffer(bytes.fromhex(fingerprint), dtype=">u4").tolist()]
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))
    positions: Positions = np.arange(rows, dtype=np.dtype(np.uint32 if rows <= 1 << 32 else np.uint64))
    generator.shuffle(positions)
    return positions


def block_edges(rows: int, blocks: int) -> list[int]:
    """Block k holds the positions from edge k up to edge k + 1."""
    return [block * rows // blocks for block in range(blocks + 1)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unit:
    """Work for one worker of the second pass: whole blocks, and the buckets that hold exactly their rows."""

    blocks: range
    buckets: range


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How positions are cut into buckets, and buckets and blocks into units. It has no influence on the output."""

    bounds: Positions
    units: tuple[Unit, ...]


def lay_out(edges: Sequence[int], rows_per_bucket: int) -> Layout:
    """Large blocks get several buckets each; small blocks share one."""
    bounds: list[int] = []
    units: list[Unit] = []
    block, blocks = 0, len(edges) - 1
    while block < blocks:
        end = block + 1
        while end < blocks and edges[end + 1] - edges[block] <= rows_per_bucket:
            end += 1
        size = edges[end] - edges[block]
        pieces = max(1, -(-size // rows_per_bucket))
        units.append(Unit(blocks=range(block, end), buckets=range(len(bounds), len(bounds) + pieces)))
        bounds.extend(edges[block] + size * piece // pieces for piece in range(pieces))
        block = end
    return Layout(bounds=np.array(bounds, dtype=np.int64), units=tuple(units))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """One input file as the first pass needs it: where its rows start in the data set."""

    path: Path
    first_row: int
    rows_of_groups: tuple[int, ...]
    columns: tuple[str, ...]
    elements: dict[str, tuple[int, Range | None]]


def survey(data_set: DataSet) -> list[Source]:
    """Read the footers of all files of a data set."""
    sources = []
    first_row = 0
    for path in data_set.paths:
        reader = ShardReader(path)
        sources.append(
            Source(
                path=path,
                first_row=first_row,
                rows_of_groups=tuple(reader.rows_of_groups),
                columns=reader.columns,
                elements={name: reader.elements(name) for name in reader.columns},
            )
        )
        first_row += reader.metadata.num_rows
        reader.close()
    return sources


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one data set. `blocks_kept` were there already."""

    folder: Path
    manifest: Manifest
    blocks_kept: int


def shuffle_set(data_set: DataSet, folder: Path, *, blocks: int, seed: int, resources: Resources) -> Outcome:
    """Shuffle a data set into `folder`, finish what a killed run began, or find it done.

    Raises:
        UserError: the folder holds something else, the disk is too small, or an input file is damaged.
    """
    plan = {"fingerprint": data_set.manifest.fingerprint, "seed": seed, "blocks": blocks}
    done = _finished(folder, plan)
    if done is not None:
        return Outcome(folder=folder, manifest=done, blocks_kept=blocks)
    _start(folder, plan)
    job = _Job(data_set, folder, blocks=blocks, seed=seed, resources=resources)
    kept = job.run()
    manifest = Manifest(
        command=COMMAND,
        options={"seed": seed, "blocks": blocks},
        files=tuple(job.entries[block] for block in range(blocks)),
        tokenizer=data_set.manifest.tokenizer,
        sources=({"name": data_set.name, "fingerprint": data_set.manifest.fingerprint},),
    )
    write_manifest(folder, manifest)
    clear_traces(folder)
    return Outcome(folder=folder, manifest=manifest, blocks_kept=kept)


def _finished(folder: Path, plan: dict[str, Any]) -> Manifest | None:
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    made = {"fingerprint": manifest.sources[0].get("fingerprint") if manifest.sources else None, **manifest.options}
    if manifest.command != COMMAND or made != plan:
        raise UserError(
            f"{folder}: holds the result of {manifest.command} with {_said(made)}, not {_said(plan)};"
            " give --clean to make it anew, or another --output"
        )
    clear_traces(folder)
    return manifest


def _said(plan: dict[str, Any]) -> str:
    short = {key: value[:8] if isinstance(value, str) else value for key, value in plan.items()}
    return ", ".join(f"{key} {value}" for key, value in short.items())


def _start(folder: Path, plan: dict[str, Any]) -> None:
    path = folder / PLAN_NAME
    if path.is_file():
        if json.loads(path.read_text(encoding="utf-8")) != plan:
            raise UserError(
                f"{folder}: holds an unfinished shuffle of other data or with other options; give --clean to start"
                " over, or another --output"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: is not empty and not made by this command; remove it, or give another --output")
    folder.mkdir(parents=True, exist_ok=True)
    atomic.remove_temporaries(folder)
    atomic.write_json(path, plan)


def clear_traces(folder: Path) -> None:
    """Remove what only an unfinished run needs."""
    shutil.rmtree(folder / SCRATCH_NAME, ignore_errors=True)
    for path in folder.glob(".*.json"):
        path.unlink()
    atomic.remove_temporaries(folder)


def clean(folder: Path) -> None:
    """Remove an earlier run's result, finished or not; anything else in the folder stays."""
    manifest = read_manifest(folder)
    plan = folder / PLAN_NAME
    if manifest is None and not plan.is_file():
        return
    if manifest is not None and manifest.command != COMMAND:
        raise UserError(f"{folder}: holds the result of {manifest.command}; --clean removes only shuffled data")
    # The manifest goes last but for the plan, so that a killed clean-up can be run again.
    for path in folder.glob(f"{folder.name}-*.parquet"):
        path.unlink()
    (folder / "_manifest.json").unlink(missing_ok=True)
    clear_traces(folder)
    if not any(folder.iterdir()):
        folder.rmdir()


class _Job:
    """The two passes over one data set."""

    def __init__(self, data_set: DataSet, folder: Path, *, blocks: int, seed: int, resources: Resources) -> None:
        self.folder = folder
        self.blocks = blocks
        self.resources = resources
        self.scratch = folder / SCRATCH_NAME
        self.sources = survey(data_set)
        self.rows = data_set.manifest.rows
        self.columns = tuple(name for name in COLUMNS if any(name in source.columns for source in self.sources))
        self.columns = self.columns or (INPUT_IDS,)
        self.compact = Compact(columns=tuple(self._compact_column(name) for name in self.columns))
        self.raw_bytes = self._packed_size()
        self.positions = destinations(self.rows, fingerprint=data_set.manifest.fingerprint, seed=seed)
        self.edges = block_edges(self.rows, blocks)
        self.input_bytes = sum(entry.bytes for entry in data_set.manifest.files)
        self.entries: dict[int, FileEntry] = {}
        self._stop = threading.Event()

    def _compact_column(self, name: str) -> CompactColumn:
        complete = all(name in source.columns for source in self.sources)
        ranges = [source.elements[name][1] for source in self.sources] if complete else [None]
        joined = join_ranges(ranges)
        if name == CU_SEQLENS and joined is not None:
            joined = joined[0], joined[1] + 1  # from shifted coordinates to those of the row
        return CompactColumn(name=name, range=joined)

    def _packed_size(self) -> int:
        """Bytes of all rows in memory: elements, a list offset for each row and column, and the position."""
        size = self.rows * OFFSET_BYTES
        for column in self.compact.columns:
            for source in self.sources:
                elements, _ = source.elements.get(column.name, source.elements[INPUT_IDS])
                size += elements * column.bytes + sum(source.rows_of_groups) * OFFSET_BYTES * 2
        return max(1, size)

    def run(self) -> int:
        """Write the blocks that are missing; how many were there."""
        for block in range(self.blocks):
            entry = self._read_entry(block)
            if entry is not None:
                self.entries[block] = entry
        kept = len(self.entries)
        if kept < self.blocks:
            self._check_disk()
            layout = self._layout()
            shutil.rmtree(self.scratch, ignore_errors=True)
            self.scratch.mkdir()
            buckets = self._scatter_all(layout)
            self._gather_all(layout, buckets)
        return kept

    @property
    def _in_memory(self) -> bool:
        return self.raw_bytes * 5 // 4 + 3 * MIN_BUCKET * self.resources.cores <= self.resources.memory

    def _check_disk(self) -> None:
        missing = 1 - len(self.entries) / self.blocks
        needed = self.input_bytes * missing * 1.1 + (1 << 20)
        if not self._in_memory:
            needed += min(self.raw_bytes, self.input_bytes * SCRATCH_SHARE) * missing
        require_disk(self.folder, int(needed), f"shuffling {self.folder.name}")

    def _layout(self) -> Layout:
        # A bucket in work takes twice its size: its pieces, and the same rows joined. A third is for the writers.
        room = self.resources.memory // (3 * self.resources.cores)
        size = min(MAX_BUCKET, max(room, MIN_BUCKET), max(MIN_BUCKET, self.raw_bytes // (4 * self.resources.cores)))
        return lay_out(self.edges, max(1, self.rows * size // self.raw_bytes))

    def _parallel(self, workers: int, function: Any) -> list[Any]:
        """Run `function(worker)` in `workers` threads; the first failure stops the others and is raised."""
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            futures = [pool.submit(function, worker) for worker in range(workers)]
            try:
                concurrent.futures.wait(futures, return_when=concurrent.futures.FIRST_EXCEPTION)
                return [future.result() for future in futures]
            except BaseException:
                self._stop.set()
                raise

    def _scatter_all(self, layout: Layout) -> list[Bucket]:
        wanted = np.zeros(len(layout.bounds), dtype=bool)
        for unit in layout.units:
            if any(block not in self.entries for block in unit.blocks):
                wanted[unit.buckets.start : unit.buckets.stop] = True
        tasks: queue.SimpleQueue[tuple[Source, int, int]] = queue.SimpleQueue()
        for task in self._groups():
            tasks.put(task)
        workers = self.resources.cores
        allowance = 1 << 62 if self._in_memory else self.resources.memory // (2 * workers)

        def work(worker: int) -> Scatter:
            scatter = Scatter(
                bounds=layout.bounds,
                wanted=wanted,
                allowance=allowance,
                scratch=self.scratch,
                worker=worker,
                compressed=self.raw_bytes > SCRATCH_SHARE * self.input_bytes,
            )
            reader: ShardReader | None = None
            while not self._stop.is_set():
                try:
                    source, group, row = tasks.get_nowait()
                except queue.Empty:
                    break
                if reader is None or reader.path != source.path:
                    reader = ShardReader(source.path)
                for batch in reader.batches(group):
                    scatter.add(
                        self.compact.pack(conform(batch, self.columns)), self.positions[row : row + batch.num_rows]
                    )
                    row += batch.num_rows
            if not self._in_memory:
                scatter.spill()
            return scatter

        scatters = self._parallel(workers, work)
        del self.positions  # the second pass has its memory for the buckets
        return [
            Bucket(
                pieces=[piece for scatter in scatters for piece in scatter.pieces.pop(bucket, [])],
                files=[scatter.files[bucket] for scatter in scatters if bucket in scatter.files],
            )
            for bucket in range(len(layout.bounds))
        ]

    def _groups(self) -> Iterator[tuple[Source, int, int]]:
        for source in self.sources:
            row = source.first_row
            for group, rows in enumerate(source.rows_of_groups):
                yield source, group, row
                row += rows

    def _gather_all(self, layout: Layout, buckets: list[Bucket]) -> None:
        tasks: queue.SimpleQueue[Unit] = queue.SimpleQueue()
        for unit in layout.units:
            tasks.put(unit)

        def work(worker: int) -> None:
            while not self._stop.is_set():
                try:
                    self._gather(tasks.get_nowait(), layout, buckets)
                except queue.Empty:
                    break

        self._parallel(min(self.resources.cores, len(layout.units)), work)

    def _gather(self, unit: Unit, layout: Layout, buckets: list[Bucket]) -> None:
        ahead = len(layout.units) < self.resources.cores  # a core is idle: let it prepare the next bucket
        rows = _UnitRows(unit, layout, buckets, rows_at_once=self._rows_at_once, ahead=ahead)
        for block in unit.blocks:
            if block in self.entries:
                continue
            with ShardWriter(self._path(block), columns=self.columns, codec=CODEC) as writer:
                for batch in rows.between(self.edges[block], self.edges[block + 1]):
                    writer.write(self.compact.unpack(batch))
            entry = entry_of_written(self._path(block), self.folder, writer.statistics)
            atomic.write_json(self._entry_path(block), dataclasses.asdict(entry))
            self.entries[block] = entry

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
            entry = FileEntry(**json.loads(self._entry_path(block).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        return entry if self._path(block).is_file() and self._path(block).stat().st_size == entry.bytes else None


class _UnitRows:
    """The rows of a unit's buckets in order of position, one bucket in memory at a time, or two with `ahead`."""

    def __init__(self, unit: Unit, layout: Layout, buckets: list[Bucket], *, rows_at_once: int, ahead: bool) -> None:
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
            bucket, self._buckets[index] = self._buckets[index], Bucket(pieces=[], files=[])
            rows = bucket.ordered()
            for path in bucket.files:
                path.unlink()
            yield rows, end


def in_background(items: Iterator[Item]) -> Iterator[Item]:
    """The same items, each prepared in a thread while the one before is in use."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        end = object()
        following = pool.submit(next, items, end)
        while (item := following.result()) is not end:
            following = pool.submit(next, items, end)
            yield item  # type: ignore[misc]
