"""Several sources in order, the next ones read ahead while one is worked on.

Each source is read on a thread of its own, a few items further than what was taken of it, and so are the sources that
come next. Decompression, waiting for disks and networks, and cutting JSON lists go on while chunks are encoded, and
many small files keep as many workers busy as one large one.

Guarantees: items come in the order of the sources; what goes wrong in a source is raised where its turn has come, after
everything before it.
Cost: memory for `ITEMS` items of each of 1 + `SOURCES` sources.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from typing import Any, Generic, TypeVar

SOURCES, ITEMS = 3, 2

T = TypeVar("T")


class _AheadReader(Generic[T]):
    """One source, read on a thread until `stop`."""

    def __init__(self, items: Iterator[T]) -> None:
        self._taken: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._room = threading.Semaphore(ITEMS - 1)
        self._stopped = False
        threading.Thread(target=self._read, args=(items,), name="read", daemon=True).start()

    def _read(self, items: Iterator[T]) -> None:
        try:
            for item in items:
                self._taken.put(("item", item))
                self._room.acquire()
                if self._stopped:
                    return
            self._taken.put(("end", None))
        except BaseException as error:  # raised where the items are taken
            self._taken.put(("error", error))

    def __iter__(self) -> Iterator[T]:
        while True:
            kind, item = self._taken.get()
            if kind == "end":
                return
            if kind == "error":
                raise item
            self._room.release()
            yield item

    def stop(self) -> None:
        self._stopped = True
        self._room.release()


def in_order(
    sources: Sequence[Callable[[], Iterator[T]]], here: Collection[int] = ()
) -> Generator[tuple[int, T], None, None]:
    """The number of each source with its items, one source after the other; close it to stop reading.

    Args:
        sources: each begins to read a source when it is called.
        here: numbers of sources that the calling thread reads, such as standard input: a thread that waits for it
            cannot be stopped.
    """
    readers: deque[_AheadReader[T] | Iterator[T]] = deque()
    begun = 0
    try:
        for number in range(len(sources)):
            while begun < min(len(sources), number + 1 + SOURCES):
                items = sources[begun]()
                readers.append(items if begun in here else _AheadReader(items))
                begun += 1
            for item in readers[0]:
                yield number, item
            readers.popleft()
    finally:
        for reader in readers:
            if isinstance(reader, _AheadReader):
                reader.stop()
