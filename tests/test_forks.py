"""Worker processes: what they share, what they raise, and that none is left."""

import functools
import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from jllm import forks
from jllm.errors import UserError
from jllm.forks import Slots, WorkerError, Workers


class UnsendableError(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def results_of(workers: Workers, tasks: list[Any]) -> dict[int, Any]:
    """Of all tasks by their number, what they raised too."""
    found: dict[int, Any] = {}

    def done(number: int, result: Any, error: BaseException | None) -> None:
        found[number] = result if error is None else error

    for number, task in enumerate(tasks):
        while not workers.wants:
            workers.step(10)
        workers.submit(task, functools.partial(done, number))
    while len(found) < len(tasks):
        workers.step(10)
    return found


def work(task: Any) -> Any:
    if isinstance(task, str):
        raise UserError(task)
    if task is None:
        raise UnsendableError(1, 2)
    return os.getpid() if task == 0 else task * 2


def wait_for(task: Any) -> Any:
    """A path: until it is there."""
    while isinstance(task, Path) and not task.exists():
        time.sleep(0.01)
    return task


@pytest.mark.parametrize("threads", [False, True])
def test_nothing_waits_behind_a_long_task(tmp_path: Path, threads: bool) -> None:
    """All others are done while it is at work; afterwards its worker has others again."""
    long, found = tmp_path / "end", list[Any]()
    with Workers(2, wait_for, threads=threads) as workers:
        for _ in range(2):
            workers.submit(long, lambda result, error: found.append(result), is_long=True)
            others = results_of(workers, [*range(20)])
            assert others == {number: number for number in range(20)}
            assert found == []
            long.touch()
            while not found:
                workers.step(10)
            assert found.pop() == long
            long.unlink()
        assert workers.wants == 4


def test_workers_pass_over_what_their_parent_has_and_leave_its_collector_as_it_is() -> None:
    before = gc.get_freeze_count()
    with Workers(1, lambda task: gc.get_freeze_count()) as workers:
        [frozen] = results_of(workers, [0]).values()
    assert frozen - before > 1000
    assert gc.get_freeze_count() == before


@pytest.mark.parametrize("threads", [False, True])
def test_results_and_mistakes_come_back(threads: bool) -> None:
    with Workers(3, work, threads=threads) as workers:
        found = results_of(workers, [*range(1, 50), "a mistake", None, b"x" * (5 << 20)])
        assert [found[number] for number in range(49)] == [2 * number for number in range(1, 50)]
        assert isinstance(found[49], UserError)
        assert str(found[49]) == "a mistake"
        assert isinstance(found[50], UnsendableError if threads else WorkerError)
        assert "1 and 2" in str(found[50])
        assert found[51] == b"x" * (10 << 20), "larger than what a socket holds, both ways"
        pids = set(results_of(workers, [0] * 20).values())
    assert (pids == {os.getpid()}) == threads
    for pid in pids - {os.getpid()}:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_memory_is_shared() -> None:
    slots = Slots(2, 100)
    assert [slots.take() for _ in range(3)] == [1, 0, None]

    def write(number: int) -> int:
        slots.memory(number, 3)[:] = bytes([number] * 3)
        return number

    with Workers(2, write) as workers:
        results_of(workers, [0, 1])
    assert bytes(slots.memory(0)) == b"\0" * 100
    assert bytes(slots.memory(1, 4)) == b"\1\1\1\0"
    slots.give_back(0)
    assert slots.take() == 0


def children() -> set[int]:
    """Processes that this one has started, and those that it has not waited for."""
    return {each.pid for each in psutil.Process().children()}


@pytest.mark.parametrize(
    "end", [lambda: os.kill(os.getpid(), signal.SIGKILL), lambda: os._exit(7)], ids=["kill", "exit"]
)
def test_a_worker_that_ends_ends_the_command(end: Callable[[], None]) -> None:
    before = children()  # of other tests
    with (
        pytest.raises(UserError, match=r"a worker process was ended (by SIGKILL, as|with code 7;).* again") as raised,
        Workers(3, lambda task: end() if task == 5 else time.sleep(0.01)) as workers,
    ):
        results_of(workers, list(range(40)))
    assert "\n" not in str(raised.value)
    assert children() <= before, "all were waited for"


def test_a_wait_can_be_ended() -> None:
    with Workers(1, work) as workers:
        begin = time.monotonic()
        workers.wake()
        workers.step(20)
        assert time.monotonic() - begin < 10


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_worker_outlives_its_parent(how: signal.Signals, tmp_path: Path) -> None:
    """A process that is left behind holds the pipe of the command open: it would not come to its end in time."""
    code = (
        "import time\nfrom jllm.forks import Workers\n"
        "with Workers(3, lambda task: time.sleep(600)) as workers:\n"
        "    for _ in range(6):\n        workers.submit(0, print)\n"
        "    print('ready', flush=True)\n    workers.step(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(how)
    process.communicate(timeout=30)
    assert process.returncode == -how


def test_a_lock_is_not_held_by_workers(tmp_path: Path) -> None:
    import fcntl

    held = (tmp_path / "lock").open("w")
    fcntl.flock(held, fcntl.LOCK_EX)
    with Workers(2, lambda task: time.sleep(task)) as workers, (tmp_path / "lock").open("w") as other:
        results_of(workers, [0, 0])
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held.close()
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_all_results_and_the_last_ones() -> None:
    found = forks.results_of(3, lambda task: (os.getpid(), task), range(20), last="end")
    assert sorted(task for _, task in found if task != "end") == list(range(20))
    assert len({pid for pid, task in found if task == "end"}) == 3
    with pytest.raises(UserError, match=r"^wrong$"):
        forks.results_of(2, work, [1, "wrong", 2])
