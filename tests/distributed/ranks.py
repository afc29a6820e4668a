"""Real process groups for tests: N processes that are started once and run one function after another together."""

import os
import queue
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _serve(rank: int, world_size: int, port: int, tasks: Any, results: Any) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    import torch

    torch.set_num_threads(1)
    while True:
        task = tasks.get()
        if task is None:
            return
        function, arguments = task
        try:
            results.put((rank, function(*arguments), None))
        except BaseException as error:
            results.put((rank, None, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))


class Ranks:
    """`world_size` processes; `run` calls a module-level function on all of them and returns their results by rank."""

    def __init__(self, world_size: int) -> None:
        context = mp.get_context("spawn")
        self.world_size = world_size
        self._tasks = [context.Queue() for _ in range(world_size)]
        self._results = context.Queue()
        port = free_port()
        self._processes = [
            context.Process(target=_serve, args=(rank, world_size, port, self._tasks[rank], self._results), daemon=True)
            for rank in range(world_size)
        ]
        for process in self._processes:
            process.start()

    def start(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Begin, without waiting."""
        for tasks in self._tasks:
            tasks.put((function, arguments))

    def run(self, function: Callable[..., Any], *arguments: Any, timeout: float = 200) -> list[Any]:
        self.start(function, *arguments)
        answers: dict[int, Any] = {}
        while len(answers) < self.world_size:
            try:
                rank, answer, failure = self._results.get(timeout=timeout)
            except queue.Empty:
                self.close()
                raise AssertionError(f"only ranks {sorted(answers)} answered within {timeout} s") from None
            if failure is not None:
                self.close()
                raise AssertionError(f"rank {rank}: {failure}")
            answers[rank] = answer
        return [answers[rank] for rank in range(self.world_size)]

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self._processes)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
