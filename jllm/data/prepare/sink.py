"""Documents to a data set on disk: splits, files, and the point from which a killed run goes on.

A `Sink` is fed the documents of one chunk after another. It cuts splits after `per_split` documents and files after
`per_file` rows, and writes on a thread of its own. Whenever a file is finished it commits: the file gets its name, then
`state-<name>.json` says which files are finished and from which document on the rest must be fed again, with the
packer's state there.

Guarantees: the files depend on the documents and options alone; a file that is named in the state, or lies finished
under its final name, is never written again.
Cost: one flush to disk for each file; memory for a few chunks.
"""

import contextlib
import dataclasses
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa

from jllm import atomic
from jllm.data.dataset.files import sha256_of
from jllm.data.dataset.manifest import FileEntry, entry_of_written
from jllm.data.dataset.shards import ShardWriter, file_name
from jllm.data.packing.packers import Documents, Packer
from jllm.data.prepare.chunk_cache import ChunkCache, Place
from jllm.errors import UserError
from jllm.guards import notation
from jllm.guards.typed import MALFORMED, check_fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResumePoint:
    """The point before a chunk, from which the sources can be read again.

    Attributes:
        source, chunk: which chunk.
        start, line: where it starts in its source (see `sources.chunk`).
        totals: what was counted before it.
    """

    source: int = 0
    chunk: int = 0
    start: int = 0
    line: int = 1
    totals: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def place(self) -> Place:
        return self.source, self.chunk

    def to_json(self) -> dict[str, Any]:
        """As it stands in the state, where a chunk is called a block."""
        return {"block" if key == "chunk" else key: value for key, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "ResumePoint":
        return cls(**{"chunk" if key == "block" else key: value for key, value in values.items()})


Position = tuple[ResumePoint, int]
"""A chunk, and how many of its documents that come to the sink are done with."""


@dataclasses.dataclass(kw_only=True)
class SplitState:
    """Where a split stands before some document.

    Attributes:
        name: `<stem>-00000`; empty between splits.
        documents, rows: documents fed and rows given so far.
        packer: the packer's state.
        stems: number of splits begun for each stem.
    """

    name: str = ""
    documents: int = 0
    rows: int = 0
    packer: dict[str, Any] = dataclasses.field(default_factory=dict)
    stems: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SinkPlan:
    """What a sink writes.

    Attributes:
        folder: of the data set.
        work: hidden folder for unfinished files and the state, on the same file system.
        name: of the sink, in the state's file name.
        packer: makes the packer of a split.
        codec: compression of the shards.
        per_split: documents in a split.
        per_file: rows in a file.
        max_rows: stop after this many rows.
        threads: compress pages at the same time; with one thread among several that encode, writing would fall behind.
    """

    folder: Path
    work: Path
    name: str
    packer: Callable[[], Packer]
    codec: str
    per_split: int
    per_file: int
    max_rows: int | None = None
    threads: int = 1


class Sink:
    """See the module. Use it as a context manager: leaving it waits for the writer, or stops it after an error.

    Args:
        cache: is told which chunks are needed no more.
    """

    def __init__(self, plan: SinkPlan, cache: ChunkCache) -> None:
        self.plan = plan
        self.entries: list[FileEntry] = []
        self.resume = ResumePoint()  # where this run starts
        self.rows_total = 0
        self._resume_document = 0
        self._split = SplitState()
        self._split_start: tuple[Position, SplitState] | None = None
        self._packer = plan.packer()
        self._cache = cache
        self._skip_rows = 0
        self._at_begin: tuple[int, dict[str, Any] | None] | None = (0, None)
        """The number of the last source of whose begin the state is known, and that state."""
        self._restore()
        cache.needed_from(plan.name, self.resume.place)
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=4)
        self._failure: BaseException | None = None
        self._pool = ThreadPoolExecutor(plan.threads, thread_name_prefix="compress") if plan.threads > 1 else None
        self._thread = threading.Thread(target=self._write_loop, name=f"writer-{plan.name}", daemon=True)
        self._thread.start()

    @property
    def _state_path(self) -> Path:
        return self.plan.work / f"state-{self.plan.name}.json"

    def _restore(self) -> None:
        """Take up what a killed run left."""
        try:
            state = notation.read_json(self._state_path)
        except FileNotFoundError:
            return
        except ValueError as error:
            raise self._no_state(error) from None
        try:
            self._at_begin = None
            self._remember_begin(state)
            self.entries = [FileEntry(**entry) for entry in state["files"]]
            self.resume = ResumePoint.from_json(state["checkpoint"])
            self._resume_document = state["document"]
            self._split = SplitState(**state["split"])
            self._check_state()
            if self._split.packer:
                self._packer.restore(self._split.packer)
        except MALFORMED as error:
            raise self._no_state(error) from None
        folder = f"{self._split.name}/"
        finished = sum(entry.rows for entry in self.entries if entry.path.startswith(folder))
        self._skip_rows = finished - self._split.rows if self._split.name else 0
        self.rows_total = sum(entry.rows for entry in self.entries) - self._skip_rows

    def _no_state(self, error: Exception) -> UserError:
        return UserError(f"{self._state_path}: not what a run left there ({error}); start over with -C")

    def _check_state(self) -> None:
        """Raises:
        TypeError, ValueError: what was read is not what was written, or a name leads out of the data set.
        """
        for value in (*self.entries, self.resume, self._split):
            check_fields(value)
        if type(self._resume_document) is not int or self._resume_document < 0:
            raise TypeError(f"document is {self._resume_document!r:.40}")
        names = [entry.path for entry in self.entries] + [self._split.name] * bool(self._split.name)
        if problem := next(filter(None, map(atomic.plain_name, names)), None):
            raise ValueError(problem)
        stems = self._split.stems.items()
        if not all(type(count) is int and count >= 0 and atomic.plain_name(stem) is None for stem, count in stems):
            raise ValueError("stems are no counts of splits")

    # Feeding.

    @property
    def full(self) -> bool:
        """Whether `max_rows` is reached: nothing more needs to be fed."""
        return self.plan.max_rows is not None and self.rows_total >= self.plan.max_rows

    def feed(self, point: ResumePoint, stem: str, documents: Documents) -> None:
        """Take the documents of one chunk; those before the resume point are passed over.

        Args:
            point: the point before the chunk.
            stem: of its source.
        """
        if point.place < self.resume.place:
            return
        done = self._resume_document if point.place == self.resume.place else 0
        while done < len(documents) and not self.full:
            if not self._split.name:
                number = self._split.stems.get(stem, 0)
                stems = {**self._split.stems, stem: number + 1}
                self._split = SplitState(name=f"{stem}-{number:05d}", stems=stems)
                self._packer = self.plan.packer()
            taken = min(len(documents) - done, self.plan.per_split - self._split.documents)
            before = self._before((point, done))
            if self._split.documents == 0:
                self._split_start = before
            fed = documents if taken == len(documents) else documents.slice(done, done + taken)
            self._emit(self._packer.feed(fed), before)
            done += taken
            self._split.documents += taken
            if self._split.documents == self.plan.per_split:
                self.end_split((point, done))

    def end_split(self, following: Position) -> None:
        """Finish the split that is open, if one is; `following` is the position of what comes next."""
        if (following[0].place, following[1]) <= (self.resume.place, self._resume_document):
            return  # read again for another sink; what is open here begins later
        if not self._split.name:
            self._put(("close", following, self._split))
            return
        before = self._split_start if self._packer.whole else self._before(following)
        assert before is not None
        for batch in self._packer.finish():
            self._emit(batch, before)
        self._split = SplitState(stems=self._split.stems)
        self._put(("close", following, self._split))

    def _before(self, position: Position) -> tuple[Position, SplitState]:
        return position, dataclasses.replace(self._split, packer=self._packer.state())

    def _emit(self, batch: pa.RecordBatch | None, before: tuple[Position, SplitState]) -> None:
        """Hand rows to the writer, cut at the ends of files; `before` is from where a later run would make them
        again."""
        if batch is None:
            return
        name = self._split.name
        if self.plan.max_rows is not None:
            batch = batch.slice(0, max(0, self.plan.max_rows - self.rows_total))
        self.rows_total += batch.num_rows
        while batch.num_rows:
            index, used = divmod(self._split.rows, self.plan.per_file)
            head = batch.slice(0, self.plan.per_file - used)
            batch = batch.slice(head.num_rows)
            self._split.rows += head.num_rows
            skipped = min(self._skip_rows, head.num_rows)
            self._skip_rows -= skipped
            if skipped == head.num_rows:
                continue
            assert skipped == 0  # finished files are whole, and batches are cut at their ends
            self._put(("rows", name, index, head))
            if used + head.num_rows == self.plan.per_file:
                self._put(("close", *before))

    def _put(self, message: tuple[Any, ...]) -> None:
        while self._failure is None:
            try:
                self._queue.put(message, timeout=0.5)
                return
            except queue.Full:
                continue
        raise self._failure

    # Writing, on its own thread.

    def _write_loop(self) -> None:
        writer: ShardWriter | None = None
        final = self.plan.folder
        while True:
            message = self._queue.get()
            try:
                if message[0] == "stop":
                    if writer is not None:
                        writer.__exit__(InterruptedError, InterruptedError(), None)
                    return
                if message[0] == "rows":
                    _, split, index, batch = message
                    if writer is None:
                        final = self.plan.folder / split / file_name(split, index, self.plan.codec)
                        writer = ShardWriter(
                            self.plan.work / final.name,
                            columns=self._packer.columns,
                            further=self._packer.further,
                            codec=self.plan.codec,
                            pool=self._pool,
                        )
                        writer.__enter__()
                    writer.write(batch)
                else:
                    if writer is not None:
                        finished, writer = writer, None
                        finished.__exit__(None, None, None)
                        self._name(finished, final)
                    self._commit(message[1], message[2])
            except BaseException as error:
                self._failure = error
                if writer is not None:
                    with contextlib.suppress(BaseException):  # the first error is the one to report
                        writer.__exit__(type(error), error, None)
                return

    def _name(self, writer: ShardWriter, final: Path) -> None:
        """Move a finished file to its place, unless a run killed at this very point had put the same file there."""
        if final.parent.is_symlink():
            raise UserError(
                f"-o {self.plan.folder}: {final.parent.name} in it is a link, which is not written through; remove it"
            )
        final.parent.mkdir(parents=True, exist_ok=True)
        if final.is_file() and sha256_of(final) == writer.statistics.sha256:
            writer.path.unlink()
        else:
            os.replace(writer.path, final)
            atomic.sync_file(final.parent)
        self.entries.append(entry_of_written(final, self.plan.folder, writer.statistics))

    def _commit(self, position: Position, split: SplitState) -> None:
        state = {
            "files": [dataclasses.asdict(entry) for entry in self.entries],
            "checkpoint": position[0].to_json(),
            "document": position[1],
            "split": {**dataclasses.asdict(split), "packer": _plain(split.packer)},
        }
        atomic.write_json(self._state_path, state)
        self._remember_begin(state)
        self._cache.needed_from(self.plan.name, position[0].place)

    def _remember_begin(self, state: dict[str, Any]) -> None:
        point = ResumePoint.from_json(state["checkpoint"])
        if point.chunk == 0 and state["document"] == 0:
            self._at_begin = (point.source, state)

    def roll_back(self, source: int) -> None:
        """Undo what was made of a source, after the sink was left. Where an earlier run made it, it stays."""
        if self._at_begin is None or self._at_begin[0] != source:
            return
        state = self._at_begin[1]
        if state is None:
            self._state_path.unlink(missing_ok=True)
        else:
            atomic.write_json(self._state_path, state)
        kept = {entry["path"] for entry in state["files"]} if state is not None else set()
        for path in (self.plan.folder / entry.path for entry in self.entries if entry.path not in kept):
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                path.parent.rmdir()

    def __enter__(self) -> "Sink":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        while self._thread.is_alive():
            try:
                self._queue.put(("stop",), timeout=0.5)
                break
            except queue.Full:
                continue
        self._thread.join()
        if self._pool is not None:
            self._pool.shutdown()
        if kind is None and self._failure is not None:
            raise self._failure


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value.tolist() if hasattr(value, "tolist") else value for key, value in state.items()}
