"""`jllm train` alone starts its processes, and what a run says last is the last thing on the screen."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from jllm.errors import UserError
from jllm.parallel.ports import free_port
from jllm.train.config import TrainConfig
from jllm.train.distributed import start
from tests.fixtures import model_and_data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_and_data(tmp_path_factory.mktemp("start"), tied=False, rows=20)


def environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}


def begin(folder: Path, *command: str) -> "subprocess.Popen[str]":
    """A command whose standard output and error are one stream, as on a screen."""
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def train(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    options = ["--model", "model", "--pipe_parallel_size", "2", "--precision", "fp32"]
    return begin(folder, sys.executable, "-m", "jllm", "train", *options, *arguments)


MISTAKE = "error: nowhere: no such folder; give the folder of a data set"


def test_a_mistake_is_the_last_thing_on_the_screen(folder: Path) -> None:
    """Through the launcher that `jllm train` starts, and through the one that a user starts."""
    launcher = ["deepspeed", "--log_level", "critical", "--num_gpus", "2", "--master_port", str(free_port())]
    options = ["--model", "model", "--pipe_parallel_size", "2", "--precision", "fp32", "--train_data", "nowhere"]
    for run in (
        train(folder, "--train_data", "nowhere"),
        begin(folder, *launcher, "--module", "jllm.train_pipe", *options),
    ):
        output, _ = run.communicate(timeout=300)
        assert run.returncode == 2, output
        assert output.splitlines()[-1] == MISTAKE
        assert output.count(MISTAKE) == 1


def test_it_trains_and_ends_with_the_exit_code_of_the_run(folder: Path, tmp_path: Path) -> None:
    """Options come from a file too, and the run's exit code 75 is that of the command."""
    (tmp_path / "options.toml").write_text('train_data = ["data"]\nsteps_per_print = 7\nmax_steps = 100000\n')
    given = ("--config", str(tmp_path / "options.toml"), "--checkpoint", str(tmp_path / "run"))
    run = train(folder, *given, "--learning_rate", "1e-3")
    metrics = tmp_path / "run/log/metrics.jsonl"
    deadline = time.monotonic() + 300
    while run.poll() is None and time.monotonic() < deadline and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.2)
    run.send_signal(signal.SIGTERM)
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 75, output
    assert "2 stages x 1 pipelines" in output
    assert "(exit code 75)" in output.splitlines()[-1]
    [saved] = (tmp_path / "run").glob("step-*")
    recorded: dict[str, Any] = json.loads((saved / "index.json").read_text())["config"]
    assert (recorded["learning_rate"], recorded["steps_per_print"], recorded["max_steps"]) == (1e-3, 7, 100000)


def test_when_processes_are_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def config_of(**options: Any) -> TrainConfig:
        return TrainConfig(model=Path("model"), train_data=("data",), **options)

    monkeypatch.delenv("RANK", raising=False)
    assert not start.starts_processes(config_of())
    assert start.starts_processes(config_of(pipe_parallel_size=2))
    assert start.starts_processes(config_of(processes=2))
    assert not start.starts_processes(config_of(pipe_parallel_size=2, dry_run=True))
    monkeypatch.setenv("RANK", "0")
    assert not start.starts_processes(config_of(pipe_parallel_size=2))


def test_devices_are_those_that_may_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "NVIDIA_DRIVER", tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-5f,6")
    assert start._devices(2) == ["3", "GPU-5f"]
    with pytest.raises(UserError, match="4 processes, and CUDA_VISIBLE_DEVICES names 3 devices; give --processes 3"):
        start._devices(4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert start._devices(2) == [0, 1]
