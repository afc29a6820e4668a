"""A service that gets a run's numbers while the run goes on, and never holds it up.

Records wait in a queue, and a thread hands them to the service's own package. What a service does not take is tried
again, at longer and longer intervals; one warning says so. Where it stays away, the oldest records are given up:
`metrics.jsonl` has them all. At the end of a run up to `CLOSE_SECONDS` are waited for what is left.
"""

import collections
import threading
import time
from pathlib import Path
from typing import Any, Protocol

from jllm.train.records.sinks.flat import flat_numbers

MOST_WAITING = 20_000
CLOSE_SECONDS, HURRY_SECONDS = 30.0, 4.0
LONGEST_PAUSE, CLOSING_PAUSE = 60.0, 1.0


class Service(Protocol):
    """What a package of a service is used for; every method may raise whatever it likes, and is then called again."""

    name: str

    def begin(self) -> None:
        """Open the run, a new one or one that goes on."""

    def numbers(self, numbers: dict[str, float], step: int) -> None:
        """Numbers of a step."""

    def artefact(self, kind: str, folder: Path, step: int) -> None:
        """A complete checkpoint or model."""

    def end(self) -> None:
        """Close the run."""


class Reporter:
    """Hands records to a service, on a thread.

    Args:
        service: which.
        pause: seconds before the first repetition of what failed.
    """

    def __init__(self, service: Service, *, pause: float = 1.0) -> None:
        self._service, self._pause = service, pause
        self._waiting: collections.deque[tuple[str, tuple[Any, ...]]] = collections.deque([("begin", ())])
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._problems: list[str] = []
        self._has_failed = False
        self._thread = threading.Thread(target=self._work, name=f"report-to-{service.name}", daemon=True)
        self._thread.start()

    def numbers(self, record: dict[str, Any]) -> None:
        """Pass on the numbers of a record."""
        numbers = flat_numbers(record)
        if numbers:
            self._put("numbers", numbers, record["step"])

    def artefact(self, kind: str, folder: Path, *, step: int) -> None:
        """Pass on that a checkpoint or model is complete."""
        self._put("artefact", kind, folder, step)

    def take_problems(self) -> list[str]:
        """Warnings that are to be said, once."""
        with self._changed:
            found, self._problems = self._problems, []
        return found

    def finish(self) -> None:
        """Nothing more comes: hand over what is left, and close the run of the service."""
        self._put("end")
        with self._changed:
            self._closing.set()
            self._changed.notify()

    def wait(self, seconds: float) -> None:
        """Wait for that for so long at most."""
        self._thread.join(max(0.0, seconds))
        if self._thread.is_alive():
            with self._changed:
                left = sum(method != "end" for method, _ in self._waiting)
                self._problems.append(f"--report_to {self._service.name}: {left} records did not get there in time")

    def _put(self, method: str, *arguments: Any) -> None:
        with self._changed:
            if len(self._waiting) >= MOST_WAITING:
                del self._waiting[1]  # the first one may be under way, or the beginning
            self._waiting.append((method, arguments))
            self._changed.notify()

    def _work(self) -> None:
        pause = self._pause
        while True:
            with self._changed:
                while not self._waiting:
                    if self._closing.is_set():
                        return
                    self._changed.wait()
                method, arguments = self._waiting[0]
            try:
                getattr(self._service, method)(*arguments)
            except Exception as error:
                self._failed(error)
                if self._closing.is_set():
                    time.sleep(min(pause, CLOSING_PAUSE))
                else:
                    self._closing.wait(pause)  # the end of a run is a reason to try at once
                pause = min(2 * pause, LONGEST_PAUSE)
                continue
            pause = self._pause
            with self._changed:
                self._waiting.popleft()

    def _failed(self, error: Exception) -> None:
        with self._changed:
            if not self._has_failed:
                self._has_failed = True
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                self._problems.append(
                    f"--report_to {self._service.name}: {reason}; it is tried again, and metrics.jsonl has everything"
                )
