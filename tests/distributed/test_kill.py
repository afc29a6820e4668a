"""kill -9 of every process at random moments, checkpoint writes included: resumed, it is the straight run."""

import os
import random
import time
from collections.abc import Callable
from pathlib import Path

from jllm.train.checkpoint import list_checkpoints, step_of_folder
from tests.distributed.ranks import Ranks
from tests.distributed.runs import records, train_rank
from tests.fixtures import random_rows, tiny_llama, write_rows

STEPS = 40
KILLS = 1 + 4 * (int(os.environ.get("JLLM_TEST_SIZE", "1")) > 1)


def test_killed_runs_go_on_exactly(ranks: Callable[[int], Ranks], tmp_path: Path) -> None:
    """Two stages, two pipelines, a checkpoint after every step, written by forked processes while training goes on."""
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
    }
    straight = {**options, "checkpoint": tmp_path / "straight", "log_dir": tmp_path / "straight-log"}
    started = time.monotonic()
    assert ranks(4).run(train_rank, straight) == [None] * 4
    seconds = time.monotonic() - started
    killed = {**options, "checkpoint": tmp_path / "killed", "log_dir": tmp_path / "killed-log"}
    metrics = tmp_path / "killed-log/metrics.jsonl"
    for kill in range(KILLS):
        group = Ranks(4)
        group.start(train_rank, killed)
        before = len(records(metrics.parent, ignore_broken=True)) if metrics.exists() else 0
        while not (metrics.exists() and len(records(metrics.parent, ignore_broken=True)) > before):
            time.sleep(0.01)
        time.sleep(random.Random(kill).uniform(0, seconds / KILLS / 2))
        group.close()
        complete = list_checkpoints(tmp_path / "killed")
        print(f"killed at step {len(records(metrics.parent, ignore_broken=True))}; complete: {complete}")
    last = step_of_folder(complete[-1]) if complete else 0
    assert ranks(4).run(train_rank, killed) == [None] * 4
    assert last < STEPS, "killed too late to show anything"
    found, expected = records(metrics.parent), records(tmp_path / "straight-log")
    assert [(r["step"], r["loss"], r["grad_norm"]) for r in found] == [
        (r["step"], r["loss"], r["grad_norm"]) for r in expected
    ]
    assert [r["consumed_tokens"] for r in found] == [r["consumed_tokens"] for r in expected]
