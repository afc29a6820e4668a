"""Writing in the background: one job at a time, in a forked child, in a thread, or at once.

A forked child sees the memory as it was when it was begun, so nothing is copied. It dies with its parent, and of
nothing else that a run is asked to end by: SIGTERM to every process (SLURM's notice) lets it finish, while its parent
saves and ends. So a killed run leaves nothing behind that still writes. Cost of a fork: about 10 ms for each GiB.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

from jllm.errors import of_file_system

_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)
_MOST_REASON = 2000
"""Bytes of a reason: a pipe takes so many at once."""


class Background:
    """Does one job at a time.

    Args:
        executor: `process`, `thread`, or `none`: before `begin` returns.
    """

    def __init__(self, executor: str) -> None:
        self._executor = executor
        self._child: int | None = None
        self._reason_from: int | None = None
        self._thread: threading.Thread | None = None
        self.failure: str | None = None
        # Looked up before any fork: loading a library in a forked child may wait for a lock that nobody holds any more.
        self._prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None

    @property
    def copies(self) -> bool:
        """Whether tensors in host memory must be copied before: a fork has its own, a thread does not."""
        return self._executor == "thread"

    def begin(self, job: Callable[[], None]) -> None:
        """Have a job done, of which the one before is over. What it raises is its failure."""
        assert self._child is None
        assert self._thread is None
        self.failure = None
        if self._executor == "process":
            self._fork(job)
        elif self._executor == "thread":
            self._thread = threading.Thread(target=self._guarded, args=(job,), name="checkpoint")
            self._thread.start()
        else:
            self._guarded(job)

    def is_done(self, *, wait: bool = False) -> bool:
        """Whether the job is over; `failure` then says why it failed, if it did. `wait`: until it is."""
        if self._thread is not None:
            if wait:
                self._thread.join()
            if self._thread.is_alive():
                return False
            self._thread = None
        if self._child is not None:
            found, status = os.waitpid(self._child, 0 if wait else os.WNOHANG)
            if found == 0:
                return False
            self._reap(status)
        return True

    def give_up(self) -> None:
        """End the job in the middle where that can be done, or wait for its end; it has failed then."""
        if self._child is not None:
            os.kill(self._child, signal.SIGKILL)
        self.is_done(wait=True)

    def _reap(self, status: int) -> None:
        assert self._reason_from is not None
        with os.fdopen(self._reason_from, "rb") as pipe:
            reason = pipe.read().decode(errors="replace")
        self._child = self._reason_from = None
        if status != 0:
            self.failure = reason or f"what writes it was ended ({os.waitstatus_to_exitcode(status)})"

    def _guarded(self, job: Callable[[], None]) -> None:
        try:
            job()
        except Exception as error:
            self.failure = _reason(error)

    def _fork(self, job: Callable[[], None]) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        self._reason_from, reason_to = os.pipe()
        # A signal between the fork and the child's own settings would run the parent's handler in the child.
        held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        child = os.fork()
        if child:
            os.close(reason_to)
            self._child = child
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
            return
        self._work(job, parent, held, reason_to)

    def _work(self, job: Callable[[], None], parent: int, held: set[int | signal.Signals], reason_to: int) -> NoReturn:
        """In the child. No tensor operations (their threads do not exist here), no imports, and no return."""
        code = 1
        try:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
            if self._prctl is not None:
                self._prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
            if os.getppid() == parent:
                job()
                code = 0
        except BaseException as error:
            with contextlib.suppress(OSError):
                os.write(reason_to, _reason(error).encode()[:_MOST_REASON])
        finally:
            os._exit(code)


def _reason(error: BaseException) -> str:
    """A failure in a line."""
    mistake = of_file_system(error) if isinstance(error, OSError) else None
    return str(mistake) if mistake is not None else f"{type(error).__name__}: {error}"
