"""How a rank ends: its name first, one line for what the user can mend, and the exit code."""

import datetime
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jllm.parallel.ports import free_port
from tests.distributed.ranks import Ranks


def end_of_rank(body: str) -> "subprocess.CompletedProcess[str]":
    """Rank 1 of a run whose work is `body`."""
    code = "from jllm.train.distributed import launch\nlaunch.LOST_RANK_SECONDS = 0.1\n"
    code += f"def work():\n    {body}\nlaunch.run_rank(work)"
    environment = {**os.environ, "RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def test_a_failure_names_its_rank_before_the_traceback() -> None:
    ended = end_of_rank("return 1 / 0")
    assert ended.returncode == 1
    first, *rest = ended.stderr.splitlines()
    assert first == "rank 1 failed: ZeroDivisionError: division by zero"
    assert rest[0].startswith("Traceback")


def test_a_mistake_is_one_line() -> None:
    ended = end_of_rank("from jllm.errors import UserError; raise UserError('data: give other data')")
    assert (ended.returncode, ended.stderr) == (2, "error: data: give other data\n")


@pytest.mark.parametrize("kind", ["MemoryError", "__import__('torch').OutOfMemoryError"])
def test_out_of_memory_names_the_batch_and_what_helps(kind: str) -> None:
    ended = end_of_rank(f"e = {kind}('no room for 3 GiB'); e.add_note('micro-batches of 4 x 2048 tokens'); raise e")
    assert ended.returncode == 2
    [line] = ended.stderr.splitlines()
    assert line.startswith("error: rank 1 is out of memory: micro-batches of 4 x 2048 tokens: no room for 3 GiB; give")
    for name in ("--checkpoint_grad_interval", "--per_device_train_batch_size", "--pipe_parallel_size"):
        assert name in line


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize(
    ("error", "line"),
    [
        ("OSError(28, 'full', 'out/a.safetensors')", "error: rank {}: out/a.safetensors: the disk is full"),
        ("MemoryError('no room')", "error: rank {} is out of memory: no room; give "),
    ],
)
def test_what_one_rank_meets_is_one_line_of_a_run(error: str, line: str, failing: int) -> None:
    """The others, which wait for it, say nothing, and outlive it, so that its exit code is the one of the run."""
    code = f"""
import datetime, os, sys, time
import torch.distributed as dist
from jllm.parallel import peers
from jllm.train.distributed import launch
peers.GRACE_SECONDS = 2.0
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=600))
peers.join(rank=launch.rank(), world_size=2, timeout=600.0)
dist.barrier()
def work():
    if launch.rank() == {failing}:
        raise {error}
    time.sleep(600)
launch._watch_launcher = lambda: None
launch.run_rank(work)
"""
    at = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, **at, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        assert ranks[failing].wait(timeout=60) == 2
        if failing:  # the first one ends by itself, and with it all others
            assert ranks[0].poll() is None
        texts = [rank.communicate(timeout=60)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [2 if number == failing else 1 for number in range(2)]
    [said] = [each for text in texts for each in text.splitlines() if each.startswith("error")]
    assert said.startswith(line.format(failing))


def test_a_rank_that_lost_another_leaves_the_first_word_to_it() -> None:
    ended = end_of_rank("raise RuntimeError('Read error [127.0.0.1]:9423: Connection reset by peer. GLHF!')")
    assert (ended.returncode, ended.stderr) == (1, "rank 1 ends: another rank is gone\n")


def test_a_checkpoint_is_written_in_spite_of_sigterm(tmp_path: Path) -> None:
    """The child that writes gets what every process of the job gets, and finishes; a signal while it begins too."""
    code = f"""
import os, signal, time
from pathlib import Path
from jllm.train.checkpoint.background import Background

background = Background("process")
seen = []
signal.signal(signal.SIGTERM, lambda *_: seen.append(os.getpid()))
for number in range(20):
    def write():
        time.sleep(0.02)
        Path({str(tmp_path)!r}, str(number)).write_text(str(seen))
    background.begin(write)
    os.kill(background._child, signal.SIGTERM)
    assert background.is_done(wait=True) and background.failure is None
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    assert [(tmp_path / str(number)).read_text() for number in range(20)] == ["[]"] * 20


def test_sigterm_is_seen_inside_a_call_that_does_not_return() -> None:
    """Such as a collective operation whose peers are gone: asked to end alone, the rank ends after a while."""
    code = """
import ctypes, os
from pathlib import Path
from jllm.train.lifecycle import requests
from jllm.train.lifecycle.requests import Requests
from jllm.train.config import TrainConfig

requests.BOUNDARY_SECONDS = 3
Requests(TrainConfig(model=Path("model"), train_data=("data",)), is_first=False, world_size=2).listen()
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
print(flush=True)
while True:
    libc.pthread_mutex_lock(mutex)  # the second time waits for ever, and no signal interrupts it
"""
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE) as rank:
        assert rank.stdout is not None
        rank.stdout.readline()
        rank.terminate()
        try:
            assert rank.wait(timeout=40) == 143
        finally:
            rank.kill()


def timeouts_of_groups(seconds: int) -> list[datetime.timedelta]:
    """Of a group that is made in a run with this `--timeout`, and of one with NCCL."""
    import torch
    from torch import distributed as dist
    from torch.distributed import distributed_c10d

    from jllm.train.distributed import launch

    launch.join(seconds)
    made = dist.new_group()._get_backend(torch.device("cpu")).options._timeout
    return [made, distributed_c10d._get_default_timeout(dist.Backend("nccl"))]


def test_groups_that_are_made_later_wait_as_long() -> None:
    [found] = Ranks(1).run(timeouts_of_groups, 7200)
    assert all(each >= datetime.timedelta(seconds=7200) for each in found), found
