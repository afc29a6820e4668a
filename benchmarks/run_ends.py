"""How long a run needs to end where nothing is saved: from what ends it until no process of it is left.

A tiny model on two stages under the `deepspeed` launcher, without checkpoints, is ended in the ways that happen, on the
machine as it is and beside two spinning processes a core. Prints one JSON line: seconds for each way, the longest of
all, and how many times longer that is on the busy machine.

    python benchmarks/run_ends.py [--only busy] [--rounds 3]
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from jllm.machine import usable_cores
from jllm.parallel.ports import free_port
from tests.distributed.launched import Run, end_group, is_launcher, rank_processes, wait_until
from tests.distributed.runs import records
from tests.fixtures import model_and_data

LIMIT_SECONDS = 10.0
"""What is promised."""
START_SECONDS = 240.0
RATE_THAT_BREAKS = "1e30"


def ranks_of(marker: str) -> list[int]:
    """The ranks of a run, the launcher's own processes apart."""
    return [process for process in rank_processes(marker) if not is_launcher(process)]


WAYS: dict[str, Callable[[Run, str], None]] = {
    "Ctrl-C": lambda run, log: os.killpg(run.pid, signal.SIGINT),
    "SIGTERM to the launcher": lambda run, log: run.send_signal(signal.SIGTERM),
    "SIGKILL of the launcher": lambda run, log: run.send_signal(signal.SIGKILL),
    "SIGTERM to one rank": lambda run, log: os.kill(ranks_of(log)[0], signal.SIGTERM),
    "SIGKILL of the last rank": lambda run, log: os.kill(ranks_of(log)[-1], signal.SIGKILL),
    "a loss that is not finite": lambda run, log: None,
}


def seconds_to_end(folder: Path, way: str) -> float:
    """From what ends a run until no process of it is left.

    Raises:
        RuntimeError: the run did not start, or did not end.
    """
    log = Path(tempfile.mkdtemp(dir=folder))
    breaks = way == "a loss that is not finite"
    command = ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), "--module", "jllm.train_pipe"]
    command += ["--pipe_parallel_size", "2", "--precision", "fp32", "--model", "model", "--train_data", "data"]
    command += ["--max_steps", "1000000", "--log_dir", str(log), "--lr_scheduler_type", "constant"]
    command += ["--learning_rate", RATE_THAT_BREAKS if breaks else "1e-4", "--gradient_clipping", "0"]
    run = Run(command, folder)
    try:
        metrics = log / "metrics.jsonl"
        wanted = (lambda: records(log, ignore_broken=True)) if breaks else (lambda: len(records(log)) > 2)
        if not wait_until(lambda: metrics.exists() and wanted(), START_SECONDS):
            raise RuntimeError(f"{way}: the run did not start: {run.output(5)[-2000:]}")
        started = time.monotonic()
        WAYS[way](run, str(log))
        while rank_processes(str(log)):
            if time.monotonic() - started > START_SECONDS:
                raise RuntimeError(f"{way}: the run did not end")
            time.sleep(0.05)
        return time.monotonic() - started
    finally:
        end_group(run)


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    """Processes that do nothing but take time."""
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", choices=["idle", "busy"])
    parser.add_argument("--rounds", type=int, default=1)
    given = parser.parse_args()
    cores = usable_cores(-1)
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = model_and_data(Path(name), tied=False, rows=20)
        for state, spinning in (("idle", 0), ("busy", 2 * cores)):
            if given.only in (None, state):
                with busy(spinning):
                    found[state] = {
                        way: round(max(seconds_to_end(folder, way) for _ in range(given.rounds)), 2) for way in WAYS
                    }
    longest = {state: max(times.values()) for state, times in found.items()}
    result = {"benchmark": "run_ends", "cores": cores, "limit": LIMIT_SECONDS, "seconds": found, "longest": longest}
    if len(longest) == 2:
        result["ratio"] = round(longest["busy"] / longest["idle"], 2)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
