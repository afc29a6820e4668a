"""Documents to a data set on disk: splits, files, and the point from which a killed run goes on.

A `Sink` is fed what is known of the documents of one chunk after another (`packing/pieces.py`), and plans their rows.
It cuts splits after `per_split` documents, files after `per_file` rows and row groups, and has others make the row
groups and write them (`writer.py`). Whenever a file is finished and has its name, `state-<name>.json` says which files
are finished and from which document on the rest must be fed again, with the planner's state there.

Guarantees: the files depend on the documents and options alone; a file that is named in the state, or lies finished
under its final name, is never written again.
Cost: numpy over the pieces of a chunk.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jllm import atomic
from jllm.data.dataset.columns import COLUMNS, ordered
from jllm.data.dataset.manifest import FileEntry
from jllm.data.dataset.shards import is_full, rows_of_group
from jllm.data.packing.packers import Packer
from jllm.data.packing.pieces import Block, Pieces, Plan
from jllm.data.prepare.saving.chunk_cache import ChunkCache, Place
from jllm.data.prepare.saving.writer import Made, Writer
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
        documents, rows: documents fed and rows planned so far.
        packer: the planner's state.
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
        packer: makes the rows.
        codec: compression of the shards.
        per_split: documents in a split.
        per_file: rows in a file.
        max_rows: stop after this many rows.
    """

    folder: Path
    work: Path
    name: str
    packer: Packer
    codec: str
    per_split: int
    per_file: int
    max_rows: int | None = None


class Maker(Protocol):
    """Has row groups made."""

    def make(self, plans: Sequence[Plan], done: Callable[[Made], None]) -> None:
        """Have a row group of these rows made; `done` is called with it, by the thread that feeds the sink."""
        ...


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
        self._planner = plan.packer.planner()
        self._has_further = any(
            each.name not in COLUMNS for each in ordered(plan.packer.columns, plan.packer.further)
        )  # which is the control class of each token
        self._maker: Maker | None = None
        self._cache = cache
        self._skip_rows = 0
        self._at_begin: tuple[int, dict[str, Any] | None] | None = (0, None)
        """The number of the last source of whose begin the state is known, and that state."""
        self._restore()
        cache.needed_from(plan.name, self.resume.place)
        self._file = ("", 0)  # split and number of the file that is open
        self._group: list[Plan] = []
        self._group_size = (0, 0)  # tokens, and bytes in further columns
        self._writer = Writer(plan.folder, plan.work, plan.packer, plan.codec, self._commit)

    def start(self, maker: Maker) -> None:
        """Begin to write, after processes were forked; `maker` has the row groups made."""
        self._maker = maker
        self._writer.start()

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
                self._planner.restore(self._split.packer)
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

    def feed(self, point: ResumePoint, stem: str, block: Block, pieces: Pieces) -> None:
        """Take the documents of one chunk; those before the resume point are passed over.

        Args:
            point: the point before the chunk.
            stem: of its source.
            block, pieces: where the documents lie, and what rows may be made of them.
        """
        if point.place < self.resume.place:
            return
        done = self._resume_document if point.place == self.resume.place else 0
        count = pieces.documents
        while done < count and not self.full:
            if not self._split.name:
                number = self._split.stems.get(stem, 0)
                stems = {**self._split.stems, stem: number + 1}
                self._split = SplitState(name=f"{stem}-{number:05d}", stems=stems)
                self._planner = self.plan.packer.planner()
            taken = min(count - done, self.plan.per_split - self._split.documents)
            mark = ((point, done), dataclasses.replace(self._split))
            if self._split.documents == 0:
                self._split_start = mark
            self._emit(self._planner.feed(block, pieces.of_documents(done, done + taken), mark))
            done += taken
            self._split.documents += taken
            if self._split.documents == self.plan.per_split:
                self.end_split((point, done))

    def end_split(self, following: Position) -> None:
        """Finish the split that is open, if one is; `following` is the position of what comes next."""
        if (following[0].place, following[1]) <= (self.resume.place, self._resume_document):
            return  # read again for another sink; what is open here begins later
        if self._split.name:
            for plan in self._planner.finish():
                self._emit(plan)
        self._split = SplitState(stems=self._split.stems)
        self._close(following, self._split)

    def _before(self) -> tuple[Position, SplitState]:
        """From where a later run would make the rows behind those that are planned."""
        if self._planner.whole:
            assert self._split_start is not None
            return self._split_start
        (position, split), state, rows = self._planner.before(self._split.rows)
        return position, dataclasses.replace(split, rows=rows, packer=state)

    def _emit(self, plan: Plan | None) -> None:
        """Have rows made, cut at the ends of files."""
        if plan is None:
            return
        name = self._split.name
        if self.plan.max_rows is not None:
            plan = plan.slice(0, min(len(plan), max(0, self.plan.max_rows - self.rows_total)))
        self.rows_total += len(plan)
        while len(plan):
            index, used = divmod(self._split.rows, self.plan.per_file)
            size = min(len(plan), self.plan.per_file - used)
            head, plan = plan.slice(0, size), plan.slice(size, len(plan))
            self._split.rows += size
            skipped = min(self._skip_rows, size)
            self._skip_rows -= skipped
            if skipped == size:
                continue
            assert skipped == 0  # finished files are whole, and rows are cut at their ends
            self._add(name, index, head)
            if used + size == self.plan.per_file:
                self._close(*self._before())

    def _add(self, split: str, index: int, plan: Plan) -> None:
        """Add rows to the row group of a file that is open, which is closed as `ShardWriter` would."""
        while len(plan):
            offsets = np.concatenate([[0], np.cumsum(plan.lengths)])
            taken = rows_of_group(offsets, 4 * offsets if self._has_further else None, *self._group_size)
            self._group.append(plan.slice(0, taken))
            tokens, further = self._group_size
            added = int(offsets[taken])
            self._group_size = (tokens + added, further + 4 * added if self._has_further else 0)
            self._file = (split, index)
            if is_full(*self._group_size):
                self._end_group()
            plan = plan.slice(taken, len(plan))

    def _end_group(self) -> None:
        if not self._group:
            return
        assert self._maker is not None
        plans, self._group, self._group_size = self._group, [], (0, 0)
        self._maker.make(plans, self._writer.group(*self._file))

    def _close(self, position: Position, split: SplitState) -> None:
        """End the file that is open, if one is; then a later run goes on from here."""
        self._end_group()
        self._writer.end_file((position, split))

    def check(self) -> None:
        """Raises:
        BaseException: what went wrong on the threads that write.
        """
        self._writer.check()

    @property
    def is_waiting(self) -> bool:
        """Whether row groups are being made."""
        return self._writer.is_waiting

    def _commit(self, entry: FileEntry | None, mark: tuple[Position, SplitState]) -> None:
        """Note a finished file, and from where a later run goes on; on the thread that finishes files."""
        position, split = mark
        self.entries += [entry] if entry is not None else []
        state = {
            "files": [dataclasses.asdict(entry) for entry in self.entries],
            "checkpoint": position[0].to_json(),
            "document": position[1],
            "split": dataclasses.asdict(split),
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
        if self._maker is not None:
            self._writer.stop()
        if kind is None:
            self.check()
