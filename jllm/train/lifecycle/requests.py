"""What one process asks of all: files that somebody made, signals, the clock, and how its checkpoint is coming along.

All processes exchange their requests at each step (`jllm.train.distributed.agreement`), so that they act together or
not at all. One process that is asked to end is enough: all save at the end of the step and leave.

Guarantees: where the others do not come to the end of a step within `BOUNDARY_SECONDS`, the process that was asked to
end does so, and says why; unless all were asked, and are on their way. A second Ctrl-C ends at once.
"""

import contextlib
import enum
import os
import signal
import sys
import threading
import time
from pathlib import Path

from jllm.errors import say
from jllm.machine import process_seconds
from jllm.parallel import peers
from jllm.train.config import TrainConfig
from jllm.train.distributed import launch
from jllm.train.lifecycle.ending import INTERRUPT_EXIT_CODE, SIGTERM_EXIT_CODE, Ending

BOUNDARY_SECONDS = 30.0


class Request(enum.IntFlag):
    """What one process asks of all, or tells them."""

    NOTHING = 0
    SAVE = 1
    QUIT = 2
    TIME_LIMIT = 4
    SIGTERM = 8
    INTERRUPT = 16
    WRITING = 32
    """Its part of a checkpoint is being written."""
    FAILED = 64
    """Its part of a checkpoint could not be written."""

    @property
    def ending(self) -> Ending | None:
        """Why the run is to end after this step."""
        for request, ending in _ENDINGS.items():
            if request & self:
                return ending
        return None


_ENDINGS = {
    Request.INTERRUPT: Ending.INTERRUPT,
    Request.SIGTERM: Ending.SIGTERM,
    Request.TIME_LIMIT: Ending.TIME_LIMIT,
    Request.QUIT: Ending.SAVE_QUIT,
}


class Requests:
    """What this process asks: files named `save` and `save_quit` in the checkpoint folder, minutes, limits, signals.

    Args:
        config: the options.
        is_first: whether this process looks at files and clock.
        world_size: of the run.
    """

    def __init__(self, config: TrainConfig, *, is_first: bool, world_size: int) -> None:
        self._root: Path | None = config.checkpoint if is_first else None
        self._minutes = config.minutes_per_checkpoint if is_first else 0.0
        self._limit = config.time_limit_seconds if is_first else None
        self._saved_at = self._asked_at = time.monotonic()
        self._longest = 0.0
        self._world_size = world_size
        self._signals = Request.NOTHING
        self._heard = threading.Event()

    def listen(self) -> None:
        """Take SIGTERM and SIGINT from now on, in a thread: the main one may be inside a collective operation."""
        if threading.current_thread() is not threading.main_thread():
            return
        received, sent = os.pipe()
        os.set_blocking(sent, False)
        signal.set_wakeup_fd(sent, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: None)  # what is told to the thread, at once
        threading.Thread(target=self._await_signals, args=(received,), name="signals", daemon=True).start()

    def _await_signals(self, received: int) -> None:
        while True:
            [number] = os.read(received, 1)
            if number not in (signal.SIGTERM, signal.SIGINT):
                continue
            if number == signal.SIGINT and Request.INTERRUPT in self._signals:
                os._exit(INTERRUPT_EXIT_CODE)
            if not self._signals:
                threading.Thread(target=self._end_in_time, name="end-in-time", daemon=True).start()
            self._signals |= Request.INTERRUPT if number == signal.SIGINT else Request.SIGTERM
            launch.asked_to_end.set()

    def _end_in_time(self) -> None:
        """End this process where the others do not come to the end of a step, and were not all asked to end."""
        peers.ask_to_end()
        if self._heard.wait(BOUNDARY_SECONDS):
            return
        asked = peers.asked_to_end()
        if len(asked) >= self._world_size or self._world_size == 1:
            return  # all are on their way, and the launcher, which has its own patience, decides
        interrupted = Request.INTERRUPT in self._signals
        if launch.rank() == min(asked, default=launch.rank()):
            with contextlib.suppress(OSError, ValueError):
                say(
                    f"error: rank {launch.rank()} was asked to end ({'Ctrl-C' if interrupted else 'SIGTERM'}), and the"
                    f" others did not come to the end of a step within {BOUNDARY_SECONDS:.0f} s: nothing is saved",
                    file=sys.stderr,
                    flush=True,
                )
        os._exit(INTERRUPT_EXIT_CODE if interrupted else SIGTERM_EXIT_CODE)

    def now(self) -> Request:
        """This process's wishes at this step."""
        wishes = self._signals
        now = time.monotonic()
        self._longest, self._asked_at = max(self._longest, now - self._asked_at), now
        if self._limit is not None and process_seconds() + self._longest > self._limit:
            wishes |= Request.TIME_LIMIT
        if self._root is not None:
            for name, wish in (("save", Request.SAVE), ("save_quit", Request.QUIT)):
                if (self._root / name).is_file():
                    (self._root / name).unlink(missing_ok=True)
                    wishes |= wish
        if self._minutes and now - self._saved_at >= 60 * self._minutes:
            wishes |= Request.SAVE
        return wishes

    def hear(self, everyone: Request) -> Ending | None:
        """Take what all ask together; why the run is to end, if it is."""
        if everyone.ending is not None:
            self._heard.set()
        return everyone.ending

    def close(self) -> None:
        """The run is over: whoever is still asked to end does so by itself."""
        self._heard.set()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)

    def saved(self) -> None:
        """A checkpoint has just begun: the minutes count from here."""
        self._saved_at = time.monotonic()
