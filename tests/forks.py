"""Processes for tests that start at once: forked from one that has imported everything and runs nothing.

Python has one such parent for all tests, so what it imports is said here, once.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["tests.preload"])


def _run_program(code: str, words: tuple[str, ...], output: Path, streams: tuple[int, ...]) -> None:
    with output.open("wb") as file:
        for stream in streams:
            os.dup2(file.fileno(), stream)
    sys.argv = ["-c", *words]
    exec(compile(code, "<program>", "exec"), {"__name__": "__main__"})


class Program:
    """`python -c code words` with its output in a file, but for the start of the interpreter and its imports; what it
    shares with `subprocess.Popen` has the same name.

    Args:
        output: the file.
        errors: whether errors go there too.
    """

    def __init__(self, code: str, *words: str, output: Path, errors: bool = True) -> None:
        self.output = output
        streams = (1, 2) if errors else (1,)
        self._process = context.Process(target=_run_program, args=(code, words, output, streams), daemon=True)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(str(self.output), timeout or 0.0)
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        if self._process.exitcode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
