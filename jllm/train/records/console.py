"""The console of a run: plain lines with the time, and on a terminal a progress bar below them.

A console that nobody reads any more, or that goes to a full disk, does not end a run.
"""

import contextlib
import datetime
import sys
from typing import Any

from jllm.errors import printable, say


class Display:
    """Lines, each printed at once, after the time in UTC; a table of several lines is printed as it is.

    On a terminal with `rich` there, a bar with the newest step's facts stays below the lines.

    Args:
        total_steps: of the run.
        first_step: the first step that this run makes.
    """

    def __init__(self, *, total_steps: int, first_step: int) -> None:
        self._progress: Any = _progress() if sys.stdout.isatty() else None
        self._task: Any = None
        self._total_steps, self._first_step = total_steps, first_step

    def say(self, line: str) -> None:
        """Print a line."""
        if "\n" not in line:
            line = f"{time_stamp('seconds')}  {line}"
        with contextlib.suppress(OSError):
            if self._task is None:
                say(line, flush=True)
            else:
                self._progress.console.print(printable(line), markup=False, highlight=False, soft_wrap=True)

    def step(self, step: int, facts: str) -> None:
        """Show where the run is."""
        if self._progress is None:
            return
        if self._task is None:
            self._progress.start()
            done = self._first_step - 1
            self._task = self._progress.add_task("train", total=self._total_steps, completed=done, facts="")
        self._progress.update(self._task, completed=step, facts=facts)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._task is not None:
            self._progress.stop()
            self._task = None


def time_stamp(timespec: str) -> str:
    """The time of the clock in UTC, as ISO 8601 writes it: "2026-01-31T23:59:59Z".

    Args:
        timespec: "seconds" or "milliseconds".
    """
    return datetime.datetime.now(datetime.UTC).isoformat(timespec=timespec).replace("+00:00", "Z")


def _progress() -> Any:
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        return None
    return Progress(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[facts]}", markup=False),
    )
