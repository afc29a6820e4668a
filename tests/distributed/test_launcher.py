"""What only the launcher shows: exit codes, one line for a mistake, and no rank that outlives its run."""

import base64
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from jllm.parallel.ports import free_port
from tests.distributed.launched import Run, end_group, is_launcher, rank_processes, wait_until
from tests.distributed.runs import records
from tests.fixtures import model_and_data, write_rows

GONE_SECONDS = 30
"""A third of it on an idle machine; what is shown is that they end, not how busy the machine is."""


def launch(folder: Path, *arguments: str) -> Run:
    command = ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), "--module", "jllm.train_pipe"]
    return Run([*command, "--pipe_parallel_size", "2", "--precision", "fp32", *arguments], folder)


def own_lines(output: str) -> list[str]:
    """The output without the launcher's own log."""
    return [
        line for line in output.splitlines() if line and not line.startswith("[20") and "ds_accelerator" not in line
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_and_data(tmp_path_factory.mktemp("launcher"), tied=False, rows=20)


def test_mistake_is_one_line_and_exit_code_2(folder: Path) -> None:
    run = launch(folder, "--model", "model", "--train_data", "nowhere")
    try:
        output = run.output(timeout=240)
    finally:
        end_group(run)
    assert run.returncode == 2, output
    assert own_lines(output) == ["error: nowhere: no such folder; give the folder of a data set"]
    assert rank_processes(str(run.pid)) == []


@pytest.mark.parametrize(
    ("whom", "number"),
    [
        ("everyone", signal.SIGINT),
        ("the launcher alone", signal.SIGINT),
        ("the launcher alone", signal.SIGTERM),
        ("the launcher alone", signal.SIGKILL),
    ],
)
def test_interrupt_ends_every_rank(folder: Path, whom: str, number: signal.Signals) -> None:
    """Ctrl-C reaches every process of a terminal; a signal to the first process must end the others too."""
    log = folder / f"log-{whom.replace(' ', '-')}-{number.name}"
    run = launch(folder, "--model", "model", "--train_data", "data", "--max_steps", "1000000", "--log_dir", str(log))
    try:
        metrics = log / "metrics.jsonl"
        assert wait_until(lambda: metrics.exists() and len(records(log)) > 2, 120)
        assert len(rank_processes(str(log))) >= 2
        if whom == "everyone":
            os.killpg(run.pid, number)
        else:
            run.send_signal(number)
        assert wait_until(lambda: not rank_processes(str(log)), GONE_SECONDS)
        assert run.wait(timeout=GONE_SECONDS) != 0
    finally:
        end_group(run)


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
        end_group(run)


def test_damage_in_the_middle_is_named_and_checkpoints_stay(folder: Path, tmp_path: Path) -> None:
    """A shard is damaged while the run goes on. The reader meets it alone; the rank that waits for it ends too."""
    data, checkpoints = tmp_path / "data", tmp_path / "ckpt"
    write_rows(data, [{"input_ids": [1, 2, 3, 4]} for _ in range(40)], files=2)
    arguments = ["--model", "model", "--train_data", str(data), "--max_steps", "1000000"]
    run = launch(folder, *arguments, "--checkpoint", str(checkpoints), "--steps_per_checkpoint", "5")
    try:
        assert wait_until(lambda: len(list(checkpoints.glob("step-*/index.json"))) > 1, 120)
        shard = sorted(data.rglob("*.parquet"))[1]
        with shard.open("r+b") as file:
            file.seek(40)
            file.write(bytes(10))
        output = run.output(timeout=60)
    finally:
        end_group(run)
    assert run.returncode == 3, output
    errors = [line for line in own_lines(output) if line.startswith("error")]
    assert len(errors) == 1, output
    [error] = errors
    assert error.startswith(f"error: {shard}: row group 0 is damaged")
    assert rank_processes(str(checkpoints)) == []
    assert len(list(checkpoints.glob("step-*/index.json"))) > 1


@pytest.mark.parametrize(
    ("whom", "every"),
    [("the ranks", 1000000), ("every process", 1000000), ("every process", 1), ("the launchers first", 1000000)],
)
def test_sigterm_to_all_saves_and_ends(folder: Path, whom: str, every: int) -> None:
    """SLURM's notice: every process gets it, the run writes a checkpoint and ends in order.

    The launcher's own processes may get it too, and before the ranks; with a checkpoint after every step, those that
    write one get it as well.
    """
    name = f"sigterm-{whom.replace(' ', '-')}-{every}"
    log, checkpoints = folder / f"log-{name}", folder / f"ckpt-{name}"
    arguments = ["--max_steps", "1000000", "--steps_per_checkpoint", str(every), "--checkpoint", str(checkpoints)]
    arguments += ["--max_num_checkpoints", "2"]
    run = launch(folder, "--model", "model", "--train_data", "data", "--log_dir", str(log), *arguments)
    try:
        assert wait_until(lambda: (log / "metrics.jsonl").exists() and len(records(log)) > 2, 120)
        if whom == "every process":
            os.killpg(run.pid, signal.SIGTERM)
        else:
            ranks = [process for process in rank_processes(str(log)) if not is_launcher(process) and process != run.pid]
            if whom == "the launchers first":
                run.send_signal(signal.SIGTERM)
                time.sleep(2)  # longer than a rank takes to see that they are gone
            for process in ranks:
                os.kill(process, signal.SIGTERM)
        code = run.wait(timeout=30)
        assert code == (75 if whom == "the ranks" else -signal.SIGTERM)
        assert wait_until(lambda: not rank_processes(str(log)), 30)
        saved = sorted(checkpoints.glob("step-*/index.json"))
        assert len(saved) == (1 if every > 1 else 2)
        assert saved[-1].parent.name == f"step-{records(log)[-1]['step']:08d}"
    finally:
        end_group(run)


def test_two_nodes_with_disks_of_their_own(folder: Path) -> None:
    """The launcher's two-node form on loopback; each node's relative --checkpoint is a folder of its own."""
    nodes = base64.urlsafe_b64encode(json.dumps({"node-0": [0], "node-1": [0]}).encode()).decode()

    def start(*arguments: str) -> None:
        port = str(free_port())
        runs = []
        for number in (0, 1):
            place = folder / f"node-{number}"
            place.mkdir(exist_ok=True)
            command = [sys.executable, "-m", "deepspeed.launcher.launch", f"--world_info={nodes}"]
            command += [f"--node_rank={number}", "--master_addr=127.0.0.1", f"--master_port={port}", "--module"]
            command += ["jllm.train_pipe", "--pipe_parallel_size", "2", "--precision", "bf16", "--model", "../model"]
            command += ["--train_data", "../data", "--checkpoint", "ckpt", "--steps_per_checkpoint", "2", *arguments]
            runs.append(Run(command, place))
        try:
            for run in runs:
                output = run.output(timeout=200)
                assert run.returncode == 0, output
        finally:
            for run in runs:
                end_group(run)

    start("--max_steps", "6", "--log_dir", "../nodes-straight")
    for number in (0, 1):
        assert (folder / f"node-{number}/ckpt/step-00000002/rank-0000{number}.safetensors").is_file()
        assert not (folder / f"node-{number}/ckpt/step-00000002/rank-0000{1 - number}.safetensors").exists()
        shutil.rmtree(folder / f"node-{number}/ckpt/step-00000006")
    # One node lost its newest checkpoint too: the run goes on from the newest that both have.
    shutil.rmtree(folder / "node-1/ckpt/step-00000004")
    start("--max_steps", "6", "--log_dir", "../nodes-resumed", "--resume_ckpt", "auto")
    straight, resumed = records(folder / "nodes-straight"), records(folder / "nodes-resumed")
    assert [(r["step"], r["loss"]) for r in resumed] == [(r["step"], r["loss"]) for r in straight[2:]]
