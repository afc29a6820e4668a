"""Row groups to files, in order, on a thread that writes and one that finishes what is written.

Row groups are made by others, in any order. A `Writer` is told of each when it is begun, and of the ends of files, and
writes what is there as soon as it is its turn. A finished file gets its name, then `commit` is called.

Guarantees: files are written in the order in which they were begun, and committed one after the other.
Cost: a checksum and a copy to the system for what is written; a file is flushed to disk while the next one is written.
"""

import collections
import contextlib
import dataclasses
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jllm import atomic
from jllm.data.dataset.files import sha256_of
from jllm.data.dataset.manifest import FileEntry, entry_of_written
from jllm.data.dataset.shards import ShardWriter, file_name
from jllm.data.packing.packers import Packer
from jllm.data.prepare.work import RowGroup
from jllm.errors import UserError


@dataclasses.dataclass(frozen=True)
class Made:
    """A row group that is made, its bytes, and what is to be called when they are needed no more, by any thread."""

    group: RowGroup
    data: memoryview
    free: Callable[[], None]


@dataclasses.dataclass(eq=False)
class _Ticket:
    """A row group that is being made, and the file that it goes to."""

    split: str
    index: int
    made: Made | None = None


class Writer:
    """See the module.

    Args:
        folder: of the data set.
        work: hidden folder for unfinished files, on the same file system.
        packer: whose rows are written.
        codec: compression of the shards.
        commit: is called on a thread with each file that is finished, or None, and what was given with its end.
    """

    def __init__(
        self, folder: Path, work: Path, packer: Packer, codec: str, commit: Callable[[FileEntry | None, Any], None]
    ) -> None:
        self._folder, self._work, self._packer, self._codec, self._commit = folder, work, packer, codec, commit
        self._order: collections.deque[_Ticket | tuple[Any]] = collections.deque()
        self._ready: queue.SimpleQueue[_Ticket | tuple[Any] | None] = queue.SimpleQueue()
        self._written: queue.Queue[tuple[ShardWriter | None, Path, Any] | None] = queue.Queue(maxsize=1)
        self._failure: BaseException | None = None
        self._threads = [
            threading.Thread(target=loop, name=name, daemon=True)
            for name, loop in (("write", self._write_all), ("finish", self._finish_all))
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def group(self, split: str, index: int) -> Callable[[Made], None]:
        """A row group of file `index` of a split is begun; what is to be called when it is made, by this thread."""
        ticket = _Ticket(split, index)
        self._order.append(ticket)

        def made(result: Made) -> None:
            ticket.made = result
            self._advance()

        return made

    def end_file(self, mark: Any) -> None:
        """The file that is open ends, if one is; `mark` is for `commit`."""
        self._order.append((mark,))
        self._advance()

    @property
    def is_waiting(self) -> bool:
        """Whether row groups are being made."""
        return bool(self._order)

    def check(self) -> None:
        """Raises:
        BaseException: what went wrong on the threads.
        """
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Wait until what is ready is written and finished; a file that has not ended is dropped."""
        self._ready.put(None)
        for thread in self._threads:
            thread.join()

    def _advance(self) -> None:
        while self._order:
            first = self._order[0]
            if isinstance(first, _Ticket) and first.made is None:
                return
            self._ready.put(self._order.popleft())

    def _write_all(self) -> None:
        writer: ShardWriter | None = None
        final = self._folder
        try:
            while (message := self._ready.get()) is not None and self._failure is None:
                if isinstance(message, _Ticket):
                    if writer is None:
                        name = file_name(message.split, message.index, self._codec)
                        final = self._folder / message.split / name
                        writer = self._opened(final.name)
                    made, message.made = message.made, None
                    assert made is not None
                    writer.append(made.group.made, made.group.facts, made.data)
                    made.free()
                else:
                    written, writer = writer, None
                    self._written.put((written, final, message[0]))
        except BaseException as error:
            self._failure = self._failure or error
        _drop(writer)
        self._written.put(None)

    def _opened(self, name: str) -> ShardWriter:
        packer = self._packer
        path = self._work / name
        return ShardWriter(path, columns=packer.columns, further=packer.further, codec=self._codec).__enter__()

    def _finish_all(self) -> None:
        failed = False
        while (message := self._written.get()) is not None:
            writer, final, mark = message
            if failed:  # nothing is committed behind what is not
                _drop(writer)
                continue
            try:
                entry = None
                if writer is not None:
                    writer.__exit__(None, None, None)
                    entry = self._named(writer, final)
                self._commit(entry, mark)
            except BaseException as error:
                failed, self._failure = True, error

    def _named(self, writer: ShardWriter, final: Path) -> FileEntry:
        """Move a finished file to its place, unless a run killed at this very point had put the same file there."""
        if final.parent.is_symlink():
            raise UserError(
                f"-o {self._folder}: {final.parent.name} in it is a link, which is not written through; remove it"
            )
        final.parent.mkdir(parents=True, exist_ok=True)
        if final.is_file() and sha256_of(final) == writer.statistics.sha256:
            writer.path.unlink()
        else:
            os.replace(writer.path, final)
            atomic.sync_file(final.parent)
        return entry_of_written(final, self._folder, writer.statistics)


def _drop(writer: ShardWriter | None) -> None:
    """Remove a file that is not finished."""
    if writer is not None:
        with contextlib.suppress(BaseException):  # the first error is the one to report
            writer.__exit__(InterruptedError, InterruptedError(), None)
