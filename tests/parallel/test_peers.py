"""Processes that watch each other: one that is killed or stands still ends all, and one line names it."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jllm.parallel.ports import free_port
from tests.forks import Program

PROGRAM = """
import sys, time, datetime
import torch.distributed as dist
from jllm.parallel import peers
import os
rank, world, port, timeout, end = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], float(sys.argv[4]), sys.argv[5]
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE=str(world))
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=600))
if end == "never joins":
    peers.JOIN_SECONDS = 2.0
    desk = [peers.open_desk(timeout) if rank == 0 else None]
    dist.broadcast_object_list(desk, src=0)
    if rank == 2:
        os._exit(7)
    peers.join(rank=rank, world_size=world, timeout=timeout, desk=desk[0], hosts=["a", "b", "c"])
    time.sleep(600)
peers.join(rank=rank, world_size=world, timeout=timeout)
dist.barrier()
peers.at_step(7)
time.sleep(1.5)
print("ready", flush=True)
if end == "order":
    time.sleep(0.3 * rank)
    peers.leave()
    dist.barrier()
    os._exit(0)
if end == f"mistake-{rank}" or end == "mistake-all":
    if peers.may_speak():
        print("error: a mistake", file=sys.stderr, flush=True)
    os._exit(2)
time.sleep(600)  # in a collective operation that nobody else comes to
"""


class Group:
    """Processes that have joined, and wait for ever unless they are told how to end."""

    def __init__(self, folder: Path, *, world: int, timeout: float, end: str = "") -> None:
        port = str(free_port())
        self.processes = [
            Program(PROGRAM, str(rank), str(world), port, str(timeout), end, output=folder / f"rank-{rank}")
            for rank in range(world)
        ]

    def ready(self) -> None:
        for process in self.processes:
            while not process.output.exists() or b"ready" not in process.output.read_bytes():
                assert process.poll() is None
                time.sleep(0.05)

    def codes(self) -> list[int]:
        return [process.wait(timeout=60) for process in self.processes]

    def errors(self) -> list[str]:
        lines = [line for process in self.processes for line in process.output.read_text().splitlines()]
        return [line for line in lines if line.startswith("error")]


@pytest.fixture
def group(tmp_path: Path) -> Iterator[type[Group]]:
    made: list[Group] = []

    class Made(Group):
        def __init__(self, *given: object, **more: object) -> None:
            super().__init__(tmp_path, *given, **more)  # type: ignore[arg-type]
            made.append(self)

    yield Made
    for each in made:
        for process in each.processes:
            process.kill()
            process.wait()


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_killed_process_ends_the_others_and_is_named(group: type[Group], lost: int) -> None:
    run = group(world=3, timeout=600)  # type: ignore[call-arg]
    run.ready()
    run.processes[lost].kill()
    assert run.codes() == [-signal.SIGKILL if rank == lost else 1 for rank in range(3)]
    [error] = run.errors()
    assert error.startswith(f"error: rank {lost} ")
    assert error.endswith("is gone, at step 7: the run ends")


def test_a_process_that_is_lost_before_it_joins_is_named(group: type[Group]) -> None:
    run = group(world=3, timeout=600, end="never joins")  # type: ignore[call-arg]
    assert run.codes() == [1, 1, 7]
    assert run.errors() == ["error: rank 2 on c is gone, before it joined: the run ends"]


@pytest.mark.parametrize("still", [0, 2])
def test_a_process_that_stands_still_is_borne_for_the_timeout(group: type[Group], still: int) -> None:
    run = group(world=3, timeout=4)  # type: ignore[call-arg]
    run.ready()
    run.processes[still].send_signal(signal.SIGSTOP)
    time.sleep(1.5)
    run.processes[still].send_signal(signal.SIGCONT)
    time.sleep(4)
    assert [process.poll() for process in run.processes] == [None] * 3, "a pause that is shorter than the timeout"
    run.processes[still].send_signal(signal.SIGSTOP)
    others = [process for rank, process in enumerate(run.processes) if rank != still]
    assert [process.wait(timeout=60) for process in others] == [1, 1]
    run.processes[still].send_signal(signal.SIGCONT)
    assert run.codes() == [1] * 3, "it ends too, when it goes on"
    assert "stood still for 4 s, at step 7: the run ends" in run.errors()[0]
    assert f"rank {still} " in run.errors()[0]


def test_an_end_in_order_is_no_loss(group: type[Group]) -> None:
    run = group(world=3, timeout=600, end="order")  # type: ignore[call-arg]
    assert run.codes() == [0] * 3
    assert run.errors() == []


@pytest.mark.parametrize(
    ("end", "codes"), [("mistake-0", [2, 1, 1]), ("mistake-2", [1, 1, 2]), ("mistake-all", [2] * 3)]
)
def test_one_speaks_of_a_mistake_and_all_end(group: type[Group], end: str, codes: list[int]) -> None:
    run = group(world=3, timeout=600, end=end)  # type: ignore[call-arg]
    assert run.codes() == codes
    assert run.errors() == ["error: a mistake"]


def test_a_stranger_at_the_desk_changes_nothing(group: type[Group], tmp_path: Path) -> None:
    """A port scanner: it knows no token."""
    import socket

    run = group(world=2, timeout=600)  # type: ignore[call-arg]
    run.ready()
    own = [
        int(line.split()[1].rsplit(":")[1], 16)
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/{run.processes[0].pid}/net/{name}").read_text().splitlines()[1:]
        if line.split()[3] == "0A" and os.stat(f"/proc/{run.processes[0].pid}").st_uid == int(line.split()[7])
    ]
    for port in own:
        for text in (b"GET / HTTP/1.0\r\n\r\n", b"[1]\n", b'{"rank": 1, "host": "x"}\n', b""):
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
                    connection.sendall(text)
            except OSError:
                continue
    time.sleep(2)
    assert [process.poll() for process in run.processes] == [None] * 2
