"""Sources to data sets: the loop of `raw2ids`.

Chunks are planned or read in order, those of the next sources ahead of their turn, and encoded by workers, each of
which saves what it made. What is known of them then (`work.Counted`) is taken in order, and fed to the sinks, which
plan rows; row groups are made by the same workers, and written. What can be redone is bounded: every encoded chunk is
on disk until the file with its last row is finished, so a killed run encodes again only the chunks that were being
encoded, two for each worker.

A chunk of one large record is begun ahead of its turn, as soon as it is found, so that the others need not wait for it.

Guarantees: everything written is a function of the sources, the tokenizer and the options; the number of workers and
the moments at which runs were killed leave no trace.
Cost: this process, beside the workers: 0.1 s of processor time for a GB of documents, and the checksums and writing of
what is written. Memory: some KB for each chunk that waits for its turn.
"""

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from jllm.data.packing.pieces import Block, Plan
from jllm.data.prepare.encoding import Encoded
from jllm.data.prepare.reporting.bad_records import BadRecordLog
from jllm.data.prepare.reporting.progress import Progress
from jllm.data.prepare.reporting.totals import Totals, stopped_at
from jllm.data.prepare.saving.chunk_cache import ChunkCache
from jllm.data.prepare.saving.sink import ResumePoint, Sink
from jllm.data.prepare.saving.writer import Made
from jllm.data.prepare.work import ChunkError, ChunkTask, Counted, GroupTask, RowGroup, SentContent, Work
from jllm.data.sources import chunks as chunks_
from jllm.data.sources import read_ahead
from jllm.data.sources.chunk import Chunk
from jllm.data.sources.chunks import read_chunks
from jllm.data.sources.inputs import Source, without_password
from jllm.data.sources.records import LARGEST_RECORD, RefusedRecordError
from jllm.errors import UserError
from jllm.forks import Slots, Workers

PLANNED_AHEAD = 1024
"""Chunks whose places are known ahead of their turn, so that large ones among them are begun early."""
ENCODED_AHEAD = 256
"""For each worker: chunks that are encoded while one before them is not done."""
LARGE = 8
"""A chunk of more than so many times the usual size is large."""
MADE_BYTES = 8 << 20
"""Of a part of shared memory for a row group: 1 M tokens and their labels before compression."""


class UnreadableSourceError(UserError):
    """A source cannot be read, or is not what its name says.

    Attributes:
        source: its number.
    """

    def __init__(self, message: str, source: int) -> None:
        super().__init__(message)
        self.source = source


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversion:
    """One run.

    Attributes:
        sources: what to read.
        columns: for each source, the Parquet columns that are needed; None for all.
        work: what workers do.
        cache: what earlier runs encoded, and this one does.
        cores: number of workers.
        threads: workers are threads of this process.
        stop_at_first_bad: `--on_error stop`.
        max_tokens: stop before the document that would take the data set beyond this many tokens.
        largest_record: bytes of the largest record that is read.
        log: is told of every bad record.
    """

    sources: Sequence[Source]
    columns: Sequence[Sequence[str] | None]
    work: Work
    cache: ChunkCache
    cores: int
    threads: bool = False
    stop_at_first_bad: bool = False
    max_tokens: int | None = None
    largest_record: int = LARGEST_RECORD
    log: BadRecordLog | None = None


class _Queue:
    """What the workers of a run have to do: row groups first, so that memory and disk are given back, then chunks."""

    def __init__(self, run: Conversion, workers: Workers, sinks: Sequence[Sink]) -> None:
        self._run, self._workers, self._sinks = run, workers, sinks
        self._groups: collections.deque[tuple[tuple[Plan, ...], Any]] = collections.deque()
        self.results: dict[int, Counted | BaseException] = {}
        """Of chunks, by their number in the run."""
        self._large = 0  # bytes of the large chunks that are being encoded

    def make(self, plans: Sequence[Plan], done: Any) -> None:
        """See `sink.Maker`."""
        self._groups.append((tuple(plans), done))
        self._make()

    def _make(self) -> None:
        made = self._run.work.made
        assert made is not None
        while self._groups and self._workers.wants and (slot := made.take()) is not None:
            plans, done = self._groups.popleft()
            self._workers.submit(GroupTask(plans, slot), functools.partial(self._made, slot, done))

    def _made(self, slot: int, done: Any, group: RowGroup, error: BaseException | None) -> None:
        slots = self._run.work.made
        assert slots is not None
        if error is not None:
            raise error

        def free() -> None:
            slots.give_back(slot)
            self._workers.wake()

        data = slots.memory(slot, group.size) if group.file is None else memoryview(group.file.read_bytes())
        if group.file is not None:
            group.file.unlink()
        done(Made(group, data, free))

    @property
    def has_room(self) -> bool:
        """Whether a chunk would be begun, and no row group comes before it."""
        return self._workers.wants > 0 and len(self._groups) < 2 * self._workers.count

    def can_take(self, size: int) -> bool:
        """Whether there is memory for a chunk of this size beside those that are being encoded."""
        most = chunks_.CHUNK_BYTES * LARGE
        return size <= most or not self._large or self._large + size <= most * self._workers.count

    def encode(self, number: int, chunk: Chunk) -> None:
        """Have a chunk encoded; `number` is its number in the run."""
        kind, sent = self._run.sources[chunk.source].kind, None
        size = _size_of(chunk)
        if not isinstance(chunk.data, int):
            chunk, sent = self._sent(chunk)
        large = size if size > chunks_.CHUNK_BYTES * LARGE else 0
        self._large += large

        def done(counted: Counted, error: BaseException | None) -> None:
            self._large -= large
            if sent is not None and self._run.work.sent is not None:
                self._run.work.sent.give_back(sent.slot)
            self.results[number] = counted if error is None else error

        self._workers.submit(ChunkTask(chunk, kind, sent), done, is_long=large > 0)

    def _sent(self, chunk: Chunk) -> tuple[Chunk, SentContent | None]:
        """The chunk with its content in shared memory, where there is room."""
        slots, data = self._run.work.sent, chunk.data
        is_table = isinstance(data, pa.Table)
        if is_table and slots is not None:
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, data.schema) as stream:
                stream.write_table(data)
            content: Any = sink.getvalue()
        else:
            content = data
        is_bytes = is_table or isinstance(content, bytes)
        if slots is None or not is_bytes or len(content) > slots.size or (slot := slots.take()) is None:
            return chunk, None
        with slots.memory(slot, len(content)) as view:
            view[:] = memoryview(content).cast("B")
        return dataclasses.replace(chunk, data=0, file=None), SentContent(slot, len(content), is_table)

    def step(self, timeout: float | None = None) -> None:
        """Wait for something to be done, and have done what can be."""
        self._workers.step(timeout)
        self._make()
        for sink in self._sinks:
            sink.check()

    def drain(self) -> None:
        """Wait until every row group is made, and given to the writers."""
        while any(sink.is_waiting for sink in self._sinks):
            self.step(1.0)

    def finish_begun(self) -> None:
        """After an error, have the row groups made that were begun, as far as that can still be done."""
        idle = 0
        with contextlib.suppress(Exception):  # the first error is the one to report
            while idle < 3 and any(sink.is_waiting for sink in self._sinks):
                self.step(1.0)
                idle = 0 if self._workers.busy else idle + 1


def convert(run: Conversion, sinks: Sequence[Sink], progress: Progress) -> Totals:
    """Read, encode and feed everything.

    Args:
        sinks: where documents go: to the first one, and those that are held out to the second.
        progress: is shown after each chunk.

    Raises:
        UnreadableSourceError: a source cannot be read.
        UserError: a bad record under `stop_at_first_bad`; a worker ended by itself.
    """
    first = min((sink.resume for sink in sinks), key=lambda point: point.place)
    totals = Totals.restored(first.totals, len(sinks))
    if run.log is not None:
        run.log.resume(first.place)
    with Workers(run.cores, run.work, threads=run.threads) as workers:
        tasks = _Queue(run, workers, sinks)
        for sink in sinks:
            sink.start(tasks)
        try:
            with contextlib.closing(_in_order(run, first, tasks)) as chunks:
                _feed(run, first, totals, chunks, sinks, progress)
        except Exception:
            tasks.finish_begun()  # what comes before it is kept
            raise
        tasks.drain()
    return totals


def _feed(
    run: Conversion,
    first: ResumePoint,
    totals: Totals,
    chunks: Iterator[tuple[int, Counted]],
    sinks: Sequence[Sink],
    progress: Progress,
) -> None:
    """Feed all chunks to the sinks, up to where one of the limits is reached."""
    point = dataclasses.replace(first, totals=totals.snapshot())

    def end_splits(following: int) -> ResumePoint:
        at = ResumePoint(source=following, totals=totals.snapshot())
        for sink in sinks:
            sink.end_split((at, 0))
        return at

    for number, counted in chunks:
        source = run.sources[number]
        while point.source < number:
            point = end_splits(point.source + 1)
        moved = [dataclasses.replace(each, line=each.line + point.line - 1) for each in counted.bad]
        counted = dataclasses.replace(counted, bad=moved)
        if run.log is not None:
            run.log.add(point.place, source.name, counted.bad)
        if run.stop_at_first_bad and counted.bad:
            raise stopped_at(source.name, counted.bad[0])
        counted, stop = _capped(run.max_tokens, totals, counted)
        totals.add(source.name, counted, counted.end - point.start, counted.fresh)
        for sink, tally, (lengths, pieces) in zip(sinks, totals.sets, counted.sets(), strict=True):
            tally.add(number, lengths)
            sink.feed(point, source.stem, counted.block, pieces)
        progress.show(totals, run.sources)
        if stop or all(sink.full for sink in sinks):
            end_splits(len(run.sources))
            return
        point = ResumePoint(
            source=number,
            chunk=point.chunk + 1,
            start=counted.end,
            line=point.line + counted.lines,
            totals=totals.snapshot(),
        )
    while point.source < len(run.sources):
        point = end_splits(point.source + 1)


def _capped(max_tokens: int | None, totals: Totals, counted: Counted) -> tuple[Counted, bool]:
    """`counted` up to the document that would take the total beyond `max_tokens`, and whether that is reached."""
    if max_tokens is None:
        return counted, False
    room = max_tokens - totals.document_tokens
    kept = int(np.searchsorted(np.cumsum(counted.lengths), room, side="right"))
    return (counted, False) if kept == len(counted.lengths) else (counted.first(kept), True)


Item = Chunk | tuple[Encoded, Block]
"""A chunk that is to be encoded, or one that an earlier run saved."""


def _in_order(run: Conversion, point: ResumePoint, tasks: _Queue) -> Generator[tuple[int, Counted], None, None]:
    """The chunks of all sources from `point` on, encoded, in order, each with the number of its source."""
    numbers = range(point.source, len(run.sources))
    readers = [functools.partial(_saved_and_read, run, point, number) for number in numbers]
    here = [number - point.source for number in numbers if run.sources[number].once or _is_planned(run.sources[number])]
    with contextlib.closing(read_ahead.in_order(readers, here)) as items:
        plan = _Upcoming((numbers[index], item) for index, item in items)
        lines = {point.source: point.line}
        taken = 0
        while True:
            while tasks.has_room and plan.begun < taken + ENCODED_AHEAD * run.cores:
                following = plan.next_for(tasks)
                if following is None:
                    break
                number, item = following
                if isinstance(item, Chunk):
                    tasks.encode(number, item)
                else:
                    tasks.results[number] = run.work.counted(*item, fresh=False)
                plan.look_ahead()  # when some worker has something to do
            while (result := tasks.results.pop(taken, None)) is not None:
                source = plan.sources.pop(taken)
                if isinstance(result, BaseException):
                    raise _placed(run, source, lines.get(source, 1), result)
                lines[source] = lines.get(source, 1) + result.lines
                yield source, result
                taken += 1
            if plan.is_done and taken == plan.found:
                break
            tasks.step(0 if taken in tasks.results else 1.0)
        if plan.failure is not None:
            raise plan.failure


class _Upcoming:
    """The chunks to come, numbered in order, of which large ones are begun before their turn."""

    def __init__(self, items: Iterator[tuple[int, Item]]) -> None:
        self._items = items
        self._next: collections.deque[tuple[int, Item]] = collections.deque()
        self._large: collections.deque[tuple[int, Item]] = collections.deque()
        self.sources: dict[int, int] = {}
        """Of chunks that are not taken yet."""
        self.found = 0
        self.begun = 0
        self.is_done = False
        self._is_planned = False  # the last one that was found: its bytes are not here
        self.failure: UserError | None = None
        """What is to be raised when all that was found is done."""

    def next_for(self, tasks: _Queue) -> tuple[int, Item] | None:
        """The chunk to be encoded next, with its number; None where there is none, or no memory for it."""
        if not self._next and not self._large:
            self._find()
        for waiting in (self._large, self._next):
            if waiting and tasks.can_take(_size_of(waiting[0][1])):
                self.begun += 1
                return waiting.popleft()
        return None

    def look_ahead(self) -> None:
        """Find some chunks more, where that costs next to nothing."""
        for _ in range(16):
            if self.is_done or not self._is_planned or len(self._next) >= PLANNED_AHEAD:
                return
            self._find()

    def _find(self) -> None:
        if self.is_done:
            return
        try:
            source, item = next(self._items)
        except StopIteration:
            self.is_done = True
            return
        except UserError as error:
            self.is_done, self.failure = True, error
            return
        self._is_planned = isinstance(item, Chunk) and isinstance(item.data, int)
        is_large = isinstance(item, Chunk) and _size_of(item) > LARGE * chunks_.CHUNK_BYTES
        (self._large if is_large else self._next).append((self.found, item))
        self.sources[self.found] = source
        self.found += 1


def _size_of(item: Item) -> int:
    """Bytes of a chunk that is to be encoded; 0 for what has none, or is a table."""
    data = item.data if isinstance(item, Chunk) else 0
    return data if isinstance(data, int) else len(data) if isinstance(data, bytes) else 0


def _placed(run: Conversion, number: int, line: int, error: BaseException) -> BaseException:
    """What a worker raised, said of the whole source: the chunk begins at `line`."""
    source = run.sources[number]
    if isinstance(error, ChunkError):
        reason: BaseException = error.args[0]
        if isinstance(reason, RefusedRecordError):
            reason = reason.behind(line).of(without_password(source.path))
        return _unreadable(source, number, reason)
    return error.behind(line) if isinstance(error, RefusedRecordError) else error


def _unreadable(source: Source, number: int, reason: BaseException) -> UnreadableSourceError:
    again = "" if source.once else "; run the same command again when it is mended"
    return UnreadableSourceError(f"{reason}{again}", number)


def _is_planned(source: Source) -> bool:
    """Whether its chunks are planned, which costs so little that it needs no thread."""
    return source.compression is None and source.is_local and source.kind in ("text", "jsonl")


def sent_slots(sources: Sequence[Source], cores: int) -> Slots | None:
    """Shared memory for the content of chunks, where it is not read by the workers."""
    if all(map(_is_planned, sources)):
        return None
    return Slots(2 * cores + 2, chunks_.CHUNK_BYTES + (1 << 18))


def made_slots(cores: int) -> Slots:
    """Shared memory for row groups."""
    return Slots(3 * cores + 2, MADE_BYTES)


def _saved_and_read(run: Conversion, point: ResumePoint, number: int) -> Iterator[Item]:
    """The chunks of a source from `point` on: as an earlier run saved them, or as they are planned or read.

    The source is not read before the first chunk that was not saved.
    """
    begin = point if number == point.source else ResumePoint(source=number)
    index, start, line = begin.chunk, begin.start, begin.line
    while (saved := run.cache.load((number, index))) is not None:
        yield saved
        index, start, line = index + 1, saved[0].end, line + saved[0].end_line - 1
    source, columns = run.sources[number], run.columns[number]
    try:
        begun = {"start": start, "line": line, "index": index}
        for chunk in read_chunks(source, number, **begun, columns=columns, most=run.largest_record, planned=True):
            yield run.cache.load((number, chunk.index)) or chunk
    except UserError as error:
        raise _unreadable(source, number, error) from None
