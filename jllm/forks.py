"""Worker processes forked from this one: they share all that it has loaded, and each does one task at a time.

A worker begins with this process's memory, copied only where either writes to it, so what is large and never changes
(the tables of a tokenizer) is loaded once. Tasks and results are pickled and go through a socket for each worker; what
is large goes through `Slots`, memory that all share. One thread drives everything: `step` hands out tasks, takes
results, and calls back.

Guarantees: what a worker raises goes to the task's callback; a worker that ends by itself ends the command with one
line; no worker outlives this process, however it ends, nor the block of `Workers`, or holds a file or lock of its.
Cost: a fork for each worker, 10 ms for 300 MB; 0.1 ms for a task. Fork before threads are started: they are not there
in the workers.
"""

import collections
import contextlib
import ctypes
import gc
import mmap
import os
import pickle
import queue
import selectors
import signal
import socket
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

from jllm.errors import UserError, say

_AT_ONCE = 2
"""Tasks that a worker has: the next one is there when it is done with one."""
_BUFFER = 1 << 20
_PR_SET_PDEATHSIG = 1
_END = object()
"""What threads are given when there is nothing more to do."""

Callback = Callable[[Any, BaseException | None], None]
"""Is given the result of a task, or what it raised."""


class WorkerError(Exception):
    """What a worker raised where it cannot be sent as it is: its traceback."""


class Slots:
    """Memory that this process and workers forked later share, in `count` parts of `size` bytes.

    A part takes memory as far as it was written to. Taking and giving back is safe from several threads.
    """

    def __init__(self, count: int, size: int) -> None:
        self.size = size
        self._memory = mmap.mmap(-1, max(1, count * size))
        self._free = collections.deque(range(count))

    def take(self) -> int | None:
        """The number of a part that nobody has; None where there is none."""
        try:
            return self._free.pop()  # the last one given back: its memory is there already
        except IndexError:
            return None

    def give_back(self, number: int) -> None:
        self._free.append(number)

    def memory(self, number: int, size: int | None = None) -> memoryview:
        """A part, or its first `size` bytes."""
        begin = number * self.size
        return memoryview(self._memory)[begin : begin + (self.size if size is None else size)]


class Workers:
    """See the module. Use it as a context manager: leaving it ends the workers, whatever they are at.

    Args:
        count: number of workers.
        work: a task to its result.
        threads: be threads of this process instead, which share one interpreter lock.
    """

    def __init__(self, count: int, work: Callable[[Any], Any], *, threads: bool = False) -> None:
        self.count = count
        self._waiting: collections.deque[tuple[Any, Callback]] = collections.deque()
        self._selector = selectors.DefaultSelector()
        self._ring, self._bell = socket.socketpair()
        for end in (self._ring, self._bell):
            end.setblocking(False)
        self._selector.register(self._bell, selectors.EVENT_READ)
        self._workers: list[_Process | _Thread] = []
        if threads:
            self._workers += [_Thread(work, self.wake) for _ in range(count)]
            return
        try:
            with _ready_to_fork():
                for _ in range(count):
                    worker = _Process(work)
                    self._workers.append(worker)
                    self._selector.register(worker.socket, selectors.EVENT_READ, worker)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers:
            worker.end()
        for worker in self._workers:
            worker.wait()
        self._selector.close()
        self._ring.close()
        self._bell.close()

    @property
    def wants(self) -> int:
        """How many tasks would be begun now, or be there when a worker is done with one."""
        return sum(_AT_ONCE - len(worker.tasks) for worker in self._workers if not worker.is_long)

    @property
    def busy(self) -> bool:
        """Whether some worker has something to do."""
        return any(worker.tasks for worker in self._workers)

    def submit(self, task: Any, callback: Callback, *, is_long: bool = False) -> None:
        """Give a task to the worker that has least to do; only while `wants` is more than 0.

        Behind one that `is_long` no other waits: its worker gets nothing more until it is done.
        """
        worker = min((each for each in self._workers if not each.is_long), key=lambda each: len(each.tasks))
        assert len(worker.tasks) < _AT_ONCE

        def done(result: Any, error: BaseException | None) -> None:
            worker.is_long = False
            callback(result, error)

        worker.is_long = is_long
        worker.tasks.append(done if is_long else callback)
        worker.send(task)
        self._watch(worker)

    def broadcast(self, task: Any, callback: Callback) -> None:
        """Give a task to every worker; only when none has anything to do."""
        assert not self.busy
        for worker in self._workers:
            worker.tasks.append(callback)
            worker.send(task)
            self._watch(worker)

    def wake(self) -> None:
        """End a `step` that waits; from any thread."""
        with contextlib.suppress(BlockingIOError, OSError):
            self._ring.send(b"\0")

    def step(self, timeout: float | None = None) -> None:
        """Wait for results, or for `wake`, and call back.

        Raises:
            UserError: a worker ended by itself.
        """
        for key, events in self._selector.select(timeout):
            worker = key.data
            if worker is None:
                with contextlib.suppress(BlockingIOError):
                    self._bell.recv(4096)
                continue
            if events & selectors.EVENT_WRITE:
                worker.flush()
                self._watch(worker)
            if events & selectors.EVENT_READ:
                self._take(worker, worker.received())
        for worker in self._workers:
            if isinstance(worker, _Thread):
                self._take(worker, worker.received())

    def _take(self, worker: "_Process | _Thread", results: list[tuple[Any, BaseException | None]]) -> None:
        for result, error in results:
            callback = worker.tasks.popleft()
            callback(result, error)

    def _watch(self, worker: "_Process | _Thread") -> None:
        if isinstance(worker, _Process):
            wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.unsent else 0)
            if self._selector.get_key(worker.socket).events != wanted:
                self._selector.modify(worker.socket, wanted, worker)


class _Process:
    """A forked worker, as its parent sees it. Sending never waits: a worker that sends a result does not read."""

    def __init__(self, work: Callable[[Any], Any]) -> None:
        self.tasks: collections.deque[Callback] = collections.deque()
        self.is_long = False
        self.unsent: collections.deque[memoryview] = collections.deque()
        self._received = bytearray()
        self.socket, theirs = socket.socketpair()
        for end in (self.socket, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            _run_worker(work, theirs, parent)
        theirs.close()
        self.socket.setblocking(False)
        self._ended = False

    def send(self, task: Any) -> None:
        data = pickle.dumps(task, protocol=5)
        self.unsent += [memoryview(len(data).to_bytes(8, "little")), memoryview(data)]
        self.flush()

    def flush(self) -> None:
        """Send what the socket takes."""
        try:
            while self.unsent:
                sent = self.socket.send(self.unsent[0])
                if sent < len(self.unsent[0]):
                    self.unsent[0] = self.unsent[0][sent:]
                else:
                    self.unsent.popleft()
        except BlockingIOError:
            pass
        except (BrokenPipeError, ConnectionResetError):
            raise self._ended_by_itself() from None

    def received(self) -> list[tuple[Any, BaseException | None]]:
        """The results that have come as a whole.

        Raises:
            UserError: the worker is gone.
        """
        try:
            data = self.socket.recv(_BUFFER)
        except BlockingIOError:
            return []
        except ConnectionResetError:
            data = b""
        if not data:
            raise self._ended_by_itself()
        self._received += data
        results = []
        while len(self._received) >= 8:
            size = int.from_bytes(self._received[:8], "little")
            if len(self._received) < 8 + size:
                break
            with memoryview(self._received) as view:
                results.append(pickle.loads(view[8 : 8 + size]))
            del self._received[: 8 + size]
        return results

    def _ended_by_itself(self) -> UserError:
        _, status = os.waitpid(self.pid, 0)
        self._ended = True
        code = os.waitstatus_to_exitcode(status)
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
        memory = ", as the system does where memory runs out" if code == -signal.SIGKILL else ""
        return UserError(
            f"a worker process was ended {how}{memory}; what is done is kept: run the same command again, perhaps with"
            " fewer --cores"
        )

    def end(self) -> None:
        if not self._ended:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> None:
        if not self._ended:
            os.waitpid(self.pid, 0)
            self._ended = True
        self.socket.close()


class _Thread:
    """A worker that is a thread of this process."""

    def __init__(self, work: Callable[[Any], Any], wake: Callable[[], None]) -> None:
        self.tasks: collections.deque[Callback] = collections.deque()
        self.is_long = False
        self._given: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self._ended = False
        self._thread = threading.Thread(target=self._run, args=(work, wake), name="worker", daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[Any], Any], wake: Callable[[], None]) -> None:
        while (task := self._given.get()) is not _END and not self._ended:
            self._results.put(_result_of(work, task))
            wake()

    def send(self, task: Any) -> None:
        self._given.put(task)

    def received(self) -> list[tuple[Any, BaseException | None]]:
        results = []
        with contextlib.suppress(queue.Empty):
            while True:
                results.append(self._results.get_nowait())
        return results

    def end(self) -> None:
        self._ended = True
        self._given.put(_END)

    def wait(self) -> None:
        self._thread.join()


def _result_of(work: Callable[[Any], Any], task: Any) -> tuple[Any, BaseException | None]:
    try:
        return work(task), None
    except BaseException as error:
        return None, error


@contextlib.contextmanager
def _ready_to_fork() -> Iterator[None]:
    """What is dead is not copied."""
    _prctl()
    gc.collect()
    with warnings.catch_warnings():  # of threads of the libraries here, which no worker needs
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def _prctl() -> Any:
    return ctypes.CDLL(None).prctl


def _let_go(kept: int) -> None:
    """Close what the parent has open, but for its streams and `kept`: a lock is held, and a socket has no end, as long
    as anybody has it. The numbers stay taken: objects that are copies of the parent's may close them."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in (0, 1, 2, kept, nothing):
            with contextlib.suppress(OSError):  # that of the listing itself
                os.fstat(int(name))
                os.dup2(nothing, int(name))


def _run_worker(work: Callable[[Any], Any], channel: socket.socket, parent: int) -> NoReturn:
    """The whole life of a worker. What its parent has is passed over by its garbage collection, which would write to
    all of it."""
    gc.freeze()
    code = 1
    try:
        _prctl()(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it was gone before
            os._exit(1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _let_go(channel.fileno())
        while True:
            data = _read(channel, 8)
            task = pickle.loads(_read(channel, int.from_bytes(data, "little")))
            answer = _pickled(_result_of(work, task))
            del task
            channel.sendall(len(answer).to_bytes(8, "little"))
            channel.sendall(answer)
    except EOFError:
        code = 0
    except (BrokenPipeError, ConnectionResetError):
        pass
    except BaseException:
        say(traceback.format_exc(), file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def _pickled(answer: tuple[Any, BaseException | None]) -> bytes:
    result, error = answer
    if error is None:
        return pickle.dumps((result, None), protocol=5)
    try:
        data = pickle.dumps((None, error), protocol=5)
        pickle.loads(data)
        return data
    except Exception:
        said = "".join(traceback.format_exception(error))
        return pickle.dumps((None, WorkerError(said)), protocol=5)


def _read(channel: socket.socket, size: int) -> bytearray:
    """Exactly so many bytes.

    Raises:
        EOFError: the parent is gone, or wants no more.
    """
    data = bytearray(size)
    view, at = memoryview(data), 0
    while at < size:
        found = channel.recv_into(view[at:])
        if not found:
            raise EOFError
        at += found
    return data


def results_of(
    count: int, work: Callable[[Any], Any], tasks: Iterable[Any], *, last: Any = None, threads: bool = False
) -> list[Any]:
    """The results of all tasks, in no order, and with `last` those of this task, which every worker gets at the end.

    Raises:
        BaseException: the first thing that a worker raised.
    """
    results: list[Any] = []

    def done(result: Any, error: BaseException | None) -> None:
        if error is not None:
            raise error
        results.append(result)

    with Workers(count, work, threads=threads) as workers:
        for task in tasks:
            while not workers.wants:
                workers.step()
            workers.submit(task, done)
        while workers.busy:
            workers.step()
        if last is not None:
            workers.broadcast(last, done)
        while workers.busy:
            workers.step()
    return results
