"""How a rank ends: its name first, one line for what the user can mend, and the exit code."""

import datetime
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
