"""How a rank ends: its name first, one line for what the user can mend, and the exit code."""

import os
import subprocess
import sys

import pytest


def end_of_rank(body: str) -> "subprocess.CompletedProcess[str]":
    """Rank 1 of a run whose work is `body`."""
    code = "from jllm.train import processes\nprocesses.LOST_RANK_SECONDS = 0.1\n"
    code += f"def work():\n    {body}\nprocesses.run_rank(work)"
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
