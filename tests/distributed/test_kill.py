"""kill -9 of every process, in a checkpoint's write and at random moments: resumed, it is the straight run."""

import contextlib
import json
import os
import random
import signal
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jllm.train.checkpoint.folders import list_checkpoints, step_of_folder, temporary_folder
from tests.distributed.ranks import Ranks
from tests.distributed.runs import records, train_rank
from tests.fixtures import random_rows, tiny_llama, write_rows

STEPS = 40
KILLS = 1 + 4 * (int(os.environ.get("JLLM_TEST_SIZE", "1")) > 1)
GONE_SECONDS = 0.5
"""After this long the writing children of ranks that were killed are gone too."""


def train_rank_watched(options: dict[str, Any], watched: Path) -> str | None:
    """A run that leaves beside its own records what the first process says, and which samples each reader reads."""
    import jllm.train.data.open as data

    watched.mkdir(parents=True, exist_ok=True)
    rank = int(os.environ["RANK"])
    read = data.train_steps
    samples = (watched / f"samples-{rank}.jsonl").open("w", buffering=1)

    def recorded(*given: Any, **more: Any) -> Iterator[Any]:
        for step in read(*given, **more):
            content = b"".join(batch.input_ids.numpy().tobytes() for batch in step.micro_batches)
            samples.write(json.dumps([step.start.epoch, step.start.rows, zlib.crc32(content)]) + "\n")
            yield step

    data.train_steps = recorded  # type: ignore[assignment]
    place = watched / "console" if rank == 0 else Path(os.devnull)
    with place.open("w", buffering=1) as file, contextlib.redirect_stdout(file):
        return train_rank(options)


def samples_of(watched: Path, rank: int) -> list[list[int]]:
    """Epoch, row and checksum of the ids of each step that a reader read, in order; some were read ahead only."""
    lines = (watched / f"samples-{rank}.jsonl").read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]


def check_went_on(watched: Path, straight: Path, checkpoints: Path, last: int) -> None:
    """The watched run began with the step after `last`, and read what the straight run read from there on."""
    lines = [line for line in (watched / "console").read_text().split("\n") if line.startswith(("going on", "step "))]
    went_on = [line for line in lines if line.startswith("going on")]
    folder = checkpoints / f"step-{last:08d}"
    assert went_on == ([f"going on from {folder} after step {last}"] if last else [])
    assert lines[len(went_on)].startswith(f"step {last + 1}/{STEPS} "), lines
    for rank in (0, 2):
        found = samples_of(watched, rank)[: STEPS - last]
        assert found
        assert found == samples_of(straight, rank)[last : last + len(found)]


@pytest.fixture
def straight(ranks: Callable[[int], Ranks], tmp_path: Path) -> dict[str, Any]:
    """The options of a run that was never interrupted: two stages, two pipelines, a checkpoint after every step."""
    tiny_llama(tmp_path / "model", tied=True)
    write_rows(tmp_path / "data", random_rows(50, labels=True, packed=True), files=3)
    options = {
        "model": tmp_path / "model",
        "train_data": (str(tmp_path / "data"),),
        "precision": "bf16",
        "pipe_parallel_size": 2,
        "global_batch_size": 8,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "steps_per_checkpoint": 1,
        "max_num_checkpoints": 3,
        "resume_ckpt": "auto",
        "checkpoint": tmp_path / "straight",
        "log_dir": tmp_path / "straight-log",
    }
    assert ranks(4).run(train_rank_watched, options, tmp_path / "watched-straight") == [None] * 4
    return options


def writing_child(parent: int) -> int | None:
    """The child of a process that writes its part of a checkpoint."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, owner = path.read_text().rpartition(")")[2].split()[:2]
            if int(owner) == parent and state != "Z":
                return int(path.parent.name)
    return None


def stop_a_write(parent: int, checkpoints: Path) -> Path:
    """Stop the child of the process that completes checkpoints while it writes one; the half-written folder."""
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        child = writing_child(parent)
        if child is None or len(list_checkpoints(checkpoints)) < 2:
            continue
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGSTOP)
            time.sleep(0.05)
            if half := [path for path in checkpoints.glob(".step-*") if ".old" not in path.name]:
                return half[0]
            os.kill(child, signal.SIGCONT)
    raise AssertionError("no checkpoint was being written")


def test_killed_runs_go_on_exactly(ranks: Callable[[int], Ranks], straight: dict[str, Any], tmp_path: Path) -> None:
    """First in the middle of a checkpoint's write, then at random moments."""
    expected = records(tmp_path / "straight-log")
    seconds = sum(record["seconds"] for record in expected)
    checkpoints, log = tmp_path / "killed", tmp_path / "killed-log"
    killed = {**straight, "checkpoint": checkpoints, "log_dir": log}
    metrics = log / "metrics.jsonl"
    last = 0
    for kill in range(1 + KILLS):
        watched = tmp_path / f"watched-{kill}"
        group = Ranks(4)
        group.start(train_rank_watched, killed, watched)
        if kill == 0:
            half = stop_a_write(group._processes[0].pid, checkpoints)
            group.close()
            time.sleep(GONE_SECONDS)
            newest = list_checkpoints(checkpoints)[-1]
            assert half.is_dir()
            assert half > temporary_folder(newest), "what is half written is newer than what is complete"
        else:
            before = len(records(log, ignore_broken=True))
            while len(records(log, ignore_broken=True)) <= before:
                time.sleep(0.01)
            time.sleep(random.Random(kill).uniform(0, seconds / KILLS / 2))
            group.close()
            time.sleep(GONE_SECONDS)
        check_went_on(watched, tmp_path / "watched-straight", checkpoints, last)
        complete = list_checkpoints(checkpoints)
        print(f"killed at step {len(records(log, ignore_broken=True))}; complete: {complete}")
        last = step_of_folder(complete[-1])
    assert 0 < last < STEPS, "killed too early or too late to show anything"
    assert metrics.is_file()
    assert ranks(4).run(train_rank_watched, killed, tmp_path / "watched") == [None] * 4
    check_went_on(tmp_path / "watched", tmp_path / "watched-straight", checkpoints, last)
    assert not list(checkpoints.glob(".step-*"))
    same = ("step", "loss", "grad_norm", "tokens", "trained_tokens", "consumed_tokens", "consumed_rows")
    found = records(log)
    assert [[record[key] for key in same] for record in found] == [[record[key] for key in same] for record in expected]
