"""Real process groups for tests: N fresh processes for each run, forked from one that has imported everything.

A process group of its own for each run is what a user has, and nothing of a run is left to the next. Process groups
that pile up in one process have threads that wake up all the time, which slows every other test.
"""

import os
import queue
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from jllm.parallel.ports import free_port
from tests.forks import context

SECONDS_AFTER_A_DEATH = 10
"""For which the others may still answer."""


def _serve(rank: int, world_size: int, port: int, results: Any, function: Callable[..., Any], arguments: Any) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        results.put((rank, function(*arguments), None))
    except BaseException as error:
        results.put((rank, None, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
    results.close()
    results.join_thread()
    # Whoever ends first would be missed by the others, which are still at work.
    threading.Event().wait()


class Ranks:
    """`world_size` processes; `run` calls a module-level function on all of them and returns their results by rank."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._processes: list[Any] = []
        self._results: Any = None

    def start(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Begin, without waiting."""
        self.close()
        self._results = context.Queue()
        port = free_port()
        for rank in range(self.world_size):
            given = (rank, self.world_size, port, self._results, function, arguments)
            process = context.Process(target=_serve, args=given, daemon=True)
            process.start()
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any, timeout: float = 200) -> list[Any]:
        self.start(function, *arguments)
        answers: dict[int, Any] = {}
        ends = time.monotonic() + timeout
        try:
            while len(answers) < self.world_size:
                try:
                    rank, answer, failure = self._results.get(timeout=SECONDS_AFTER_A_DEATH)
                except queue.Empty:
                    gone = [rank for rank, process in enumerate(self._processes) if process.exitcode is not None]
                    if gone or time.monotonic() > ends:
                        told = f"only these ranks answered within {timeout} s: {answers}; gone: {gone}"
                        raise AssertionError(told) from None
                    continue
                assert failure is None, f"rank {rank}: {failure}"
                answers[rank] = answer
                ends = time.monotonic() + timeout
        finally:
            self.close()
        return [answers[rank] for rank in range(self.world_size)]

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._processes = []
