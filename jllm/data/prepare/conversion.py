"""Sources to data sets: the loop of `raw2ids`.

Chunks are read in order, those of the next sources ahead of their turn, encoded on every core, saved, and fed in order
to the sinks. What can be redone is bounded: every encoded chunk is on disk until the file with its last row is
finished, so a killed run encodes again only the chunks that were in flight, at most `IN_FLIGHT_BYTES` of input.

Guarantees: everything written is a function of the sources, the tokenizer and the options; the number of workers and
the moments at which runs were killed leave no trace.
Cost: the engine takes every core it is given; reading, packing and writing take a small share of their time.
"""

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from jllm.data.prepare.chunk_cache import ChunkCache
from jllm.data.prepare.encoding import ChunkEncoder, Encoded
from jllm.data.prepare.holdout import Holdout
from jllm.data.prepare.reporting.bad_records import BadRecordLog
from jllm.data.prepare.reporting.progress import Progress
from jllm.data.prepare.reporting.totals import Totals, stopped_at
from jllm.data.prepare.sink import ResumePoint, Sink
from jllm.data.sources import read_ahead
from jllm.data.sources.chunk import Chunk
from jllm.data.sources.chunks import CHUNK_BYTES, read_chunks
from jllm.data.sources.inputs import Source
from jllm.data.sources.records import LARGEST_RECORD
from jllm.errors import UserError

IN_FLIGHT_BYTES, IN_FLIGHT_CHUNKS = 48 << 20, 24


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
        encoder: the work for one chunk.
        cache: what earlier runs encoded, and this one does.
        workers: chunks that are encoded at the same time.
        holdout: which documents go to which sink.
        stop_at_first_bad: `--on_error stop`.
        max_tokens: stop before the document that would take the data set beyond this many tokens.
        largest_record: bytes of the largest record that is read.
        log: is told of every bad record.
    """

    sources: Sequence[Source]
    columns: Sequence[Sequence[str] | None]
    encoder: ChunkEncoder
    cache: ChunkCache
    workers: int
    holdout: Holdout
    stop_at_first_bad: bool = False
    max_tokens: int | None = None
    largest_record: int = LARGEST_RECORD
    log: BadRecordLog | None = None


def convert(run: Conversion, sinks: Sequence[Sink], progress: Progress) -> Totals:
    """Read, encode and feed everything.

    Args:
        sinks: where documents go, as `holdout` deals them.
        progress: is shown after each chunk.

    Raises:
        UnreadableSourceError: a source cannot be read.
        UserError: a bad record under `stop_at_first_bad`.
    """
    first = min((sink.resume for sink in sinks), key=lambda point: point.place)
    totals = Totals.restored(first.totals, len(sinks))
    if run.log is not None:
        run.log.resume(first.place)
    point = dataclasses.replace(first, totals=totals.snapshot())

    def end_splits(following: int) -> ResumePoint:
        at = ResumePoint(source=following, totals=totals.snapshot())
        for sink in sinks:
            sink.end_split((at, 0))
        return at

    with (
        ThreadPoolExecutor(max_workers=run.workers, thread_name_prefix="encode") as pool,
        contextlib.closing(_in_order(run, first, pool)) as chunks,
    ):
        for number, encoded, fresh in chunks:
            source = run.sources[number]
            while point.source < number:
                point = end_splits(point.source + 1)
            if run.log is not None:
                run.log.add(point.place, source.name, encoded.bad)
            if run.stop_at_first_bad and encoded.bad:
                raise stopped_at(source.name, encoded.bad[0])
            encoded, stop = _capped(run.max_tokens, totals, encoded)
            totals.add(source.name, encoded, encoded.end - point.start, fresh)
            for sink, tally, documents in zip(sinks, totals.sets, run.holdout.dealt(encoded.documents), strict=True):
                tally.add(number, documents.lengths)
                sink.feed(point, source.stem, documents)
            progress.show(totals, run.sources)
            if stop or all(sink.full for sink in sinks):
                pool.shutdown(wait=True, cancel_futures=True)
                end_splits(len(run.sources))
                return totals
            point = ResumePoint(
                source=number,
                chunk=point.chunk + 1,
                start=encoded.end,
                line=encoded.end_line,
                totals=totals.snapshot(),
            )
        while point.source < len(run.sources):
            point = end_splits(point.source + 1)
    return totals


def _capped(max_tokens: int | None, totals: Totals, encoded: Encoded) -> tuple[Encoded, bool]:
    """`encoded` up to the document that would take the total beyond `max_tokens`, and whether that is reached."""
    if max_tokens is None:
        return encoded, False
    room = max_tokens - totals.document_tokens
    kept = int(np.searchsorted(encoded.documents.offsets, room, side="right")) - 1
    if kept == len(encoded.documents):
        return encoded, False
    return dataclasses.replace(encoded, documents=encoded.documents.slice(0, kept)), True


def _in_order(
    run: Conversion, point: ResumePoint, pool: ThreadPoolExecutor
) -> Generator[tuple[int, Encoded, bool], None, None]:
    """The chunks of all sources from `point` on, encoded, in order: number of the source, chunk, and whether this run
    encoded it."""
    waiting: collections.deque[tuple[int, Future[tuple[Encoded, bool]], int]] = collections.deque()
    weight, most = 0, max(IN_FLIGHT_CHUNKS, 2 * run.workers + 2)  # small files make small chunks

    def work(chunk: Chunk, begun: Future[Any] | None) -> tuple[Encoded, bool]:
        encoded = run.encoder(chunk, run.sources[chunk.source].kind, begun)
        return run.cache.save((chunk.source, chunk.index), encoded), True

    numbers = range(point.source, len(run.sources))
    readers = [functools.partial(_saved_and_read, run, point, number) for number in numbers]
    here = [number - point.source for number in numbers if run.sources[number].once]
    with contextlib.closing(read_ahead.in_order(readers, here)) as items:
        failure: UserError | None = None
        while True:
            try:
                index, item = next(items)
            except StopIteration:
                break
            except UserError as error:  # raised when what was read before it is done
                failure = error
                break
            size = len(item.data) if isinstance(item, Chunk) and isinstance(item.data, bytes) else CHUNK_BYTES
            while waiting and (len(waiting) >= most or weight + size > IN_FLIGHT_BYTES or waiting[0][1].done()):
                number, future, done = waiting.popleft()
                weight -= done
                yield number, *future.result()
            if isinstance(item, Chunk):
                begun = run.encoder.begin(item, run.sources[item.source].kind)
                future = pool.submit(work, item, begun)
            else:
                future = Future()
                future.set_result((item, False))
            waiting.append((numbers[index], future, size))
            weight += size
        while waiting:
            number, future, _ = waiting.popleft()
            yield number, *future.result()
        if failure is not None:
            raise failure


def _saved_and_read(run: Conversion, point: ResumePoint, number: int) -> Iterator[Encoded | Chunk]:
    """The chunks of a source from `point` on: as an earlier run saved them, or as they are read.

    The source is not read before the first chunk that was not saved.
    """
    begin = point if number == point.source else ResumePoint(source=number)
    index, start, line = begin.chunk, begin.start, begin.line
    while (saved := run.cache.load((number, index))) is not None:
        yield saved
        index, start, line = index + 1, saved.end, saved.end_line
    source, columns = run.sources[number], run.columns[number]
    try:
        begun = {"start": start, "line": line, "index": index}
        for chunk in read_chunks(source, number, **begun, columns=columns, most=run.largest_record):
            yield run.cache.load((number, chunk.index)) or chunk
    except UserError as error:
        again = "" if source.once else "; run the same command again when it is mended"
        raise UnreadableSourceError(f"{error}{again}", number) from None
