"""Sources to data sets: the loop of `raw2ids`.

Blocks are read in order, those of the next sources ahead of their turn, encoded on every core, saved, and fed in order
to the sinks. What can be redone is bounded: every encoded block is on disk until the file with its last row is
finished, so a killed run encodes again only the blocks that were in flight, at most `IN_FLIGHT_BYTES` of input.

Guarantees: everything written is a function of the sources, the tokenizer and the options; the number of workers and
the moments at which runs were killed leave no trace.
Cost: the engine takes every core it is given; reading, packing and writing take about half a core for each 50 MB/s.
"""

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jllm.data.dataset.shards import Int64
from jllm.data.packing.packers import Documents
from jllm.data.prepare import encoding
from jllm.data.prepare.encoding import Encoded
from jllm.data.prepare.sink import Checkpoint, Sink
from jllm.data.sources import read_ahead
from jllm.data.sources.blocks import BLOCK_BYTES, Block, read_blocks
from jllm.data.sources.inputs import STDIN, Source
from jllm.data.sources.records import BadRecord
from jllm.errors import UserError

IN_FLIGHT_BYTES, IN_FLIGHT_BLOCKS = 48 << 20, 24
MAX_EXAMPLES = 5
BAD_SHARE, BAD_LEAST = 0.01, 10


class Encoder(Protocol):
    """The work for one block."""

    def begin(self, block: Block, kind: str) -> Future[Any] | None:
        """Begin the part that other processes do; None where they do nothing."""
        ...

    def __call__(self, block: Block, kind: str, begun: Future[Any] | None = None) -> Encoded: ...


@dataclasses.dataclass(kw_only=True)
class Tally:
    """The documents of one data set.

    Attributes:
        sources: for each source: documents and document tokens.
        lengths: documents by length: exact up to 256 tokens, then in steps of 1/32 of an octave.
        longest: the longest document.
    """

    sources: list[dict[str, int]] = dataclasses.field(default_factory=list)
    lengths: dict[int, int] = dataclasses.field(default_factory=dict)
    longest: int = 0

    @property
    def documents(self) -> int:
        return sum(source["documents"] for source in self.sources)

    @property
    def document_tokens(self) -> int:
        return sum(source["document_tokens"] for source in self.sources)

    def snapshot(self) -> "Tally":
        """A copy, cheap enough to take before every block."""
        sources = self.sources[:-1] + [dict(source) for source in self.sources[-1:]]
        return Tally(sources=sources, lengths=dict(self.lengths), longest=self.longest)

    @classmethod
    def restored(cls, values: dict[str, Any]) -> "Tally":
        """The inverse of `dataclasses.asdict`, also after a round through JSON."""
        return cls(**{**values, "lengths": {int(bucket): count for bucket, count in values["lengths"].items()}})

    def add(self, source: int, lengths: Int64) -> None:
        """Count documents of these lengths."""
        while len(self.sources) <= source:
            self.sources.append({"documents": 0, "document_tokens": 0})
        self.sources[source]["documents"] += len(lengths)
        self.sources[source]["document_tokens"] += int(lengths.sum())
        self.longest = max(self.longest, int(lengths.max(initial=0)))
        for bucket, count in zip(*np.unique(length_bucket(lengths), return_counts=True), strict=True):
            self.lengths[int(bucket)] = self.lengths.get(int(bucket), 0) + int(count)

    def quantile(self, share: float) -> int:
        """The length that this share of the documents does not exceed, within 3 %."""
        wanted, seen = share * self.documents, 0
        for bucket in sorted(self.lengths):
            seen += self.lengths[bucket]
            if seen >= wanted:
                return min(self.longest, bucket if bucket <= 256 else int(2 ** ((bucket - 256) / 32 + 8)))
        return 0


@dataclasses.dataclass(kw_only=True)
class Totals:
    """What was found in the sources, over the whole input.

    Attributes:
        counts: sums of `Encoded.counts`.
        bad: bad records by kind: how many, and the first few as "file:line detail".
        sets: the documents of each data set that is made.
        encoded_bytes: input that this run encoded (decompressed bytes; rows of Parquet).
        read_bytes: input behind everything counted here, whoever encoded it.
    """

    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    bad: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    sets: list[Tally] = dataclasses.field(default_factory=list)
    encoded_bytes: int = 0
    read_bytes: int = 0

    @property
    def documents(self) -> int:
        return sum(tally.documents for tally in self.sets)

    @property
    def document_tokens(self) -> int:
        return sum(tally.document_tokens for tally in self.sets)

    @property
    def bad_records(self) -> int:
        return sum(kind["count"] for kind in self.bad.values())

    def snapshot(self) -> dict[str, Any]:
        """A copy as plain data but for the tallies, cheap enough to take before every block."""
        bad = {kind: {**found, "examples": list(found["examples"])} for kind, found in self.bad.items()}
        sets = [tally.snapshot() for tally in self.sets]
        return dict(self.__dict__, counts=dict(self.counts), bad=bad, sets=sets)

    @classmethod
    def restored(cls, snapshot: dict[str, Any], sets: int) -> "Totals":
        """The inverse of `snapshot` and `dataclasses.asdict`, also after a round through JSON; nothing is encoded yet
        in this run. An empty one begins `sets` tallies."""
        if not snapshot:
            return cls(sets=[Tally() for _ in range(sets)])
        totals = cls(**{**snapshot, "sets": [Tally.restored(values) for values in snapshot["sets"]]})
        totals.encoded_bytes = 0
        return totals

    def add(self, name: str, encoded: Encoded, size: int, fresh: bool) -> None:
        """Count a block of `size` bytes of the source `name`, but for its documents; `fresh` where this run encoded
        it."""
        self.read_bytes += size
        self.encoded_bytes += size if fresh else 0
        for key, value in encoded.counts.items():
            self.counts[key] = self.counts.get(key, 0) + value
        for record in encoded.bad:
            kind = self.bad.setdefault(record.kind, {"count": 0, "examples": []})
            kind["count"] += 1
            if len(kind["examples"]) < MAX_EXAMPLES:
                kind["examples"].append(describe(name, record))


def describe(name: str, record: BadRecord) -> str:
    """ "file:line: kind: detail", for people."""
    return f"{name}:{record.line}: {record.kind}: {record.detail}"


def length_bucket(lengths: Any) -> Any:
    """Numbers whose order is that of the lengths, and of which there are few."""
    coarse = 256 + np.ceil((np.log2(np.maximum(lengths, 1)) - 8) * 32)
    return np.where(lengths <= 256, lengths, coarse).astype(np.int64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversion:
    """One run.

    Attributes:
        sources: what to read.
        encoder: the work for one block.
        work: hidden folder for encoded blocks and the state.
        workers: blocks that are encoded at the same time.
        vocab_size: number of ids, which decides how wide saved ids are.
        columns: Parquet columns that are needed; None for all.
        stop_at_first_bad: `--on_error stop`.
        max_tokens: stop before the document that would take the data set beyond this many tokens.
        from_disk: feed blocks as they were saved, for packers that read them again later.
    """

    sources: Sequence[Source]
    encoder: Encoder
    work: Path
    workers: int
    vocab_size: int
    columns: Sequence[str] | None = None
    stop_at_first_bad: bool = False
    max_tokens: int | None = None
    from_disk: bool = False


def block_path(work: Path, source: int, index: int) -> Path:
    return work / f"block-{source:05d}-{index:07d}"


def convert(
    run: Conversion,
    sinks: Sequence[Sink],
    deal: Callable[[Documents], list[Documents]],
    watch: Callable[[Totals], None],
) -> Totals:
    """Read, encode and feed everything.

    Args:
        sinks: where documents go.
        deal: documents → those for each sink.
        watch: called after each block.

    Raises:
        UserError: a source cannot be read, or a bad record under `stop_at_first_bad`.
    """
    first = min((sink.resume for sink in sinks), key=lambda checkpoint: checkpoint.place)
    totals = Totals.restored(first.totals, len(sinks))
    point = dataclasses.replace(first, totals=totals.snapshot())

    def end_splits(following: int) -> Checkpoint:
        at = Checkpoint(source=following, totals=totals.snapshot())
        for sink in sinks:
            sink.end_split((at, 0))
        return at

    with (
        ThreadPoolExecutor(max_workers=run.workers, thread_name_prefix="encode") as pool,
        contextlib.closing(_in_order(run, first, pool)) as blocks,
    ):
        for number, encoded, fresh in blocks:
            source = run.sources[number]
            while point.source < number:
                point = end_splits(point.source + 1)
            if run.stop_at_first_bad and encoded.bad:
                raise UserError(
                    f"--on_error stop: {describe(source.name, encoded.bad[0])}; repair it, or use --on_error skip"
                )
            encoded, stop = _capped(run.max_tokens, totals, encoded)
            totals.add(source.name, encoded, encoded.end - point.start, fresh)
            for sink, tally, part in zip(sinks, totals.sets, deal(encoded.documents), strict=True):
                tally.add(number, part.lengths)
                sink.feed(point, source.stem, part)
            watch(totals)
            if stop or all(sink.full for sink in sinks):
                pool.shutdown(wait=True, cancel_futures=True)
                end_splits(len(run.sources))
                return totals
            point = Checkpoint(
                source=number,
                block=point.block + 1,
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
    run: Conversion, point: Checkpoint, pool: ThreadPoolExecutor
) -> Generator[tuple[int, Encoded, bool], None, None]:
    """The blocks of all sources from `point` on, encoded, in order: number of the source, block, and whether this run
    encoded it.

    What an earlier run saved is taken from disk as far as it goes without a gap; from there on a source is read.
    """
    waiting: collections.deque[tuple[int, Future[tuple[Encoded, bool]], int]] = collections.deque()
    weight, most = 0, max(IN_FLIGHT_BLOCKS, 2 * run.workers + 2)  # small files make small blocks

    def begin(block: Block) -> Future[Any] | None:
        known = block_path(run.work, block.source, block.index).exists()
        return None if known else run.encoder.begin(block, run.sources[block.source].kind)

    def work(block: Block, begun: Future[Any] | None) -> tuple[Encoded, bool]:
        path = block_path(run.work, block.source, block.index)
        known = encoding.load(path)
        if known is not None:
            return known, False
        encoded = run.encoder(block, run.sources[block.source].kind, begun)
        encoding.save(path, encoded, run.vocab_size, wide=run.from_disk)
        if run.from_disk:
            encoded = encoding.load(path, check=False) or encoded
        return encoded, True

    numbers = range(point.source, len(run.sources))
    readers = [functools.partial(_saved_and_read, run, point, number) for number in numbers]
    here = [number - point.source for number in numbers if run.sources[number].path == STDIN]
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
            size = len(item.data) if isinstance(item, Block) and isinstance(item.data, bytes) else BLOCK_BYTES
            while waiting and (len(waiting) >= most or weight + size > IN_FLIGHT_BYTES or waiting[0][1].done()):
                number, future, done = waiting.popleft()
                weight -= done
                yield number, *future.result()
            if isinstance(item, Block):
                future = pool.submit(work, item, begin(item))
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


def _saved_and_read(run: Conversion, point: Checkpoint, number: int) -> Iterator[Encoded | Block]:
    """What an earlier run saved of a source, and then the blocks that are left of it."""
    begin = point if number == point.source else Checkpoint(source=number)
    index, start, line = begin.block, begin.start, begin.line
    while (saved := encoding.load(block_path(run.work, number, index))) is not None:
        yield saved
        index, start, line = index + 1, saved.end, saved.end_line
    yield from read_blocks(run.sources[number], number, start=start, line=line, index=index, columns=run.columns)


def check_bad_share(totals: Totals) -> None:
    """The default of `--on_error`.

    Raises:
        UserError: more than 1 % and at least 10 of all records are bad.
    """
    records = totals.counts.get("records", 0)
    if totals.bad_records < BAD_LEAST or totals.bad_records <= BAD_SHARE * records:
        return
    kinds = ", ".join(f"{kind}: {found['count']}" for kind, found in totals.bad.items())
    example = next(iter(totals.bad.values()))["examples"][0]
    raise UserError(
        f"{totals.bad_records} of {records} records are bad ({kinds}; {example}): more than 1 %; repair the input, or"
        " take the rest with --on_error skip"
    )


def remove_blocks_before(work: Path, place: tuple[int, int]) -> None:
    """Delete saved blocks that no sink needs any more."""
    limit = block_path(work, *place).name
    for path in work.glob("block-*"):
        if path.name < limit:
            path.unlink(missing_ok=True)
