"""What only the launcher shows: exit codes, one line for a mistake, and no rank that outlives its run."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.ranks import free_port
from tests.distributed.runs import records
from tests.fixtures import random_rows, tiny_llama, write_rows

GONE_SECONDS = 10


def launch(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    command = ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), "--module", "jllm.train_pipe"]
    return subprocess.Popen(
        [*command, "--pipe_parallel_size", "2", "--precision", "fp32", *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def own_lines(output: str) -> list[str]:
    """The output without the launcher's own log."""
    return [
        line for line in output.splitlines() if line and not line.startswith("[20") and "ds_accelerator" not in line
    ]


def rank_processes(marker: str) -> list[int]:
    """Ranks whose command line has `marker`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if "jllm.train_pipe" in command and marker in command:
            found.append(int(path.parent.name))
    return found


def is_launcher(process: int) -> bool:
    return b"deepspeed.launcher" in Path(f"/proc/{process}/cmdline").read_bytes()


def wait_until(condition: Callable[[], object], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.2)
    return False


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launcher")
    tiny_llama(folder / "model", tied=False)
    write_rows(folder / "data", random_rows(20), files=2)
    return folder


def test_mistake_is_one_line_and_exit_code_2(folder: Path) -> None:
    run = launch(folder, "--model", "model", "--train_data", "nowhere")
    output, _ = run.communicate(timeout=120)
    assert run.returncode == 2, output
    assert own_lines(output) == ["error: nowhere: no such folder; give the folder of a data set"]
    assert rank_processes(str(run.pid)) == []


@pytest.mark.parametrize("whom", ["everyone", "the launcher alone"])
def test_interrupt_ends_every_rank(folder: Path, whom: str) -> None:
    """Ctrl-C reaches every process of a terminal; a signal to the first process must end the others too."""
    log = folder / f"log-{whom.replace(' ', '-')}"
    run = launch(folder, "--model", "model", "--train_data", "data", "--max_steps", "1000000", "--log_dir", str(log))
    try:
        metrics = log / "metrics.jsonl"
        assert wait_until(lambda: metrics.exists() and len(records(log)) > 2, 120)
        assert len(rank_processes(str(log))) >= 2
        if whom == "everyone":
            os.killpg(run.pid, signal.SIGINT)
        else:
            run.send_signal(signal.SIGINT)
        assert wait_until(lambda: not rank_processes(str(log)), GONE_SECONDS)
        assert run.wait(timeout=GONE_SECONDS) != 0
    finally:
        for process in rank_processes(str(log)):
            os.kill(process, signal.SIGKILL)


def test_a_killed_rank_ends_the_run(folder: Path) -> None:
    log = folder / "log-killed"
    run = launch(folder, "--model", "model", "--train_data", "data", "--max_steps", "1000000", "--log_dir", str(log))
    try:
        metrics = log / "metrics.jsonl"
        assert wait_until(lambda: metrics.exists() and len(records(log)) > 2, 120)
        workers = [pid for pid in rank_processes(str(log)) if not is_launcher(pid)]
        os.kill(max(workers), signal.SIGKILL)
        assert wait_until(lambda: not rank_processes(str(log)), GONE_SECONDS)
        assert run.wait(timeout=GONE_SECONDS) != 0
    finally:
        for process in rank_processes(str(log)):
            os.kill(process, signal.SIGKILL)
