"""Two network namespaces: a run survives a link that is slow or away for a while, and ends where it stays away."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jllm.parallel.ports import free_port
from tests.distributed.launched import Run, end_group, is_launcher, rank_processes, wait_until
from tests.distributed.namespaces import ADDRESSES, Namespaces, why_not
from tests.distributed.nodes import node_command
from tests.distributed.runs import records
from tests.fixtures import model_and_data

TIMEOUT = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_and_data(tmp_path_factory.mktemp("links"), tied=False, rows=20)


@pytest.fixture
def namespaces() -> Iterator[Namespaces]:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    with Namespaces() as made:
        yield made


def start(namespaces: Namespaces, folder: Path, log: Path) -> list[Run]:
    port = free_port()
    line = ["--pipe_parallel_size", "2", "--precision", "fp32", "--model", "model", "--train_data", "data"]
    line += ["--max_steps", "1000000", "--timeout", str(TIMEOUT), "--log_dir", str(log)]
    runs = []
    for node in (0, 1):
        command = namespaces.inside(node, [*node_command(node, port=port, address=ADDRESSES[0]), *line])
        runs.append(Run(command, folder, environment=namespaces.environment(node)))
    return runs


def steps(log: Path) -> int:
    return len(records(log, ignore_broken=True)) if (log / "metrics.jsonl").exists() else 0


@pytest.mark.parametrize("event", ["cut", "cut briefly", "shaped", "killed"])
def test_links(namespaces: Namespaces, folder: Path, tmp_path: Path, event: str) -> None:
    log = tmp_path / "log"
    runs = start(namespaces, folder, log)
    try:
        assert wait_until(lambda: steps(log) > 2, 90)
        if event == "shaped":
            if not namespaces.shape("netem", "delay", "50ms") and not namespaces.shape(
                *("tbf", "rate", "1mbit", "burst", "32kbit", "latency", "400ms")
            ):
                pytest.skip("this kernel shapes no links (neither netem nor tbf)")
        elif event == "killed":
            lost = [each for each in rank_processes(str(log)) if not is_launcher(each) and _rank(each) == "1"]
            os.kill(lost[0], signal.SIGKILL)
        else:
            namespaces.cut()
        if event in ("cut", "killed"):
            outputs = [run.output(timeout=90) for run in runs]
            assert all(run.returncode != 0 for run in runs)
            errors = [line for output in outputs for line in output.splitlines() if line.startswith("error")]
            said = "is gone, at step" if event == "killed" else f"has stood still for {TIMEOUT} s, at step"
            assert any(line.startswith("error: rank 1 on ") and said in line for line in errors), outputs
            return
        if event == "cut briefly":
            time.sleep(TIMEOUT / 4)
            namespaces.mend()
        before = steps(log)
        assert wait_until(lambda: steps(log) > before + 3, 60), "the run goes on"
        assert [run.poll() for run in runs] == [None, None]
    finally:
        for run in runs:
            end_group(run)


def _rank(process: int) -> str:
    variables = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    return next((each[5:].decode() for each in variables if each.startswith(b"RANK=")), "")
