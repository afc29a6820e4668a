"""Three weeks of a cluster in half an hour: one command line, started again and again, through everything that happens.

    python benchmarks/three_weeks.py [--events 60] [--seed 1] [--steps_per_event 80]

A supervisor does what a scheduler does: it starts a run of two processes, always by the same line, until it exits with
0. Meanwhile events happen at random moments: kill -9 of a rank, of the launcher, of all; a file-size limit that makes
one process's writes fail for a while; a flipped byte in the newest checkpoint; a second start; the lock of a run on
another host; a rank that stands still for longer than `--timeout`; SIGTERM to one or all; the line's own time limit.

Prints one JSON line: how often each event came, how many starts it took, and whether the losses of all steps are
bit-identical to those of an undisturbed run. The exit code is 1 where they are not, or where an end asked for a person.
"""

import argparse
import base64
import collections
import contextlib
import dataclasses
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from jllm.parallel.ports import free_port  # noqa: E402

TIMEOUT_SECONDS = 15
CHECKPOINT_STEPS = 10
PATIENCE_SECONDS = 400.0
"""Longer than any start, wait for a lock or end takes: a supervisor that waits for so long has found a fault."""
TIME_LIMIT_CODES = (75,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What came of it.

    Attributes:
        events: how often each came.
        starts: of the line.
        codes: how often the line ended with each exit code.
        steps: of the run.
        identical: whether the losses are those of the undisturbed run, for all steps.
        asked_for_a_person: ends with a code after which nobody starts again.
    """

    events: dict[str, int]
    starts: int
    codes: dict[str, int]
    steps: int
    identical: bool
    asked_for_a_person: int


class Start(subprocess.Popen[bytes]):
    """The line, started once, in a session of its own."""

    def __init__(self, line: list[str], output: Path) -> None:
        self.output = output
        # The `deepspeed` command in front of this launcher ends with 0 where the launcher was killed.
        world = base64.urlsafe_b64encode(json.dumps({"localhost": [0, 1]}).encode()).decode()
        launcher = [sys.executable, "-m", "deepspeed.launcher.launch", f"--world_info={world}", "--node_rank=0"]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        with output.open("ab") as file:
            super().__init__(
                [*launcher, "--master_addr=127.0.0.1", f"--master_port={free_port()}", *line],
                stdout=file,
                stderr=file,
                start_new_session=True,
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PATH": path},
            )

    def processes(self) -> dict[int, list[str]]:
        """The processes of the session that live: number → command line."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                state, _, _, session = (path / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(session) == self.pid and state not in "ZX":
                    found[int(path.name)] = (path / "cmdline").read_bytes().decode(errors="replace").split("\0")
        return found

    def ranks(self) -> list[int]:
        """The ranks, in no order. What writes a checkpoint is the child of one, and not among them."""
        return [
            each
            for each, words in self.processes().items()
            if any(word.startswith("--local_rank=") for word in words) and parent_of(each) in (self.pid, 1)
        ]

    def send(self, processes: list[int], number: signal.Signals) -> None:
        for each in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, number)

    def clear(self) -> None:
        """What a scheduler does after a job's end: nothing of it stays."""
        self.send(list(self.processes()), signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(30)
        wait_for(lambda: not self.processes(), 30)


class ThreeWeeks:
    """A run, its supervisor, and what happens to it.

    Args:
        folder: an empty one.
        events: how many.
        seed: of the events.
        steps_per_event: steps that the run has for each of them.
    """

    def __init__(self, folder: Path, *, events: int, seed: int, steps_per_event: int) -> None:
        from tests.fixtures import random_rows, tiny_llama, write_rows

        self.folder, self.random = folder, random.Random(seed)
        self.steps = steps_per_event * events
        tiny_llama(folder / "model", tied=True, vocabulary=4096)
        write_rows(folder / "data", random_rows(300, labels=True, packed=True), files=3)
        kinds = list(self.kinds())
        self.left = [kinds[number % len(kinds)] for number in range(events)]
        self.random.shuffle(self.left)
        self.counts: collections.Counter[str] = collections.Counter()
        self.codes: collections.Counter[str] = collections.Counter()
        self.starts = 0

    def line(self, place: Path) -> list[str]:
        """The command line; it never changes."""
        options = {
            "model": self.folder / "model",
            "train_data": self.folder / "data",
            "pipe_parallel_size": 2,
            "gradient_accumulation_steps": 4,
            "precision": "fp32",
            "learning_rate": 1e-3,
            "max_steps": self.steps,
            "checkpoint": place / "ckpt",
            "steps_per_checkpoint": CHECKPOINT_STEPS,
            "max_num_checkpoints": 3,
            "resume_ckpt": "auto",
            "timeout": TIMEOUT_SECONDS,
            "time_limit": "3m",
        }
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        return ["--module", "jllm.train_pipe", *words]

    def losses(self, place: Path) -> list[tuple[int, float]]:
        text = (place / "ckpt/log/metrics.jsonl").read_text(encoding="utf-8")
        found = [json.loads(line) for line in text.splitlines()]
        return [(record["step"], record["loss"]) for record in found if "loss" in record]

    def run(self) -> Result:
        """The undisturbed run, then the other one."""
        straight, place = self.folder / "straight", self.folder / "place"
        for each in (straight, place):
            each.mkdir()
        code = 75
        while code in TIME_LIMIT_CODES:
            start = Start(self.line(straight), straight / "output")
            code = start.wait()
            start.clear()
        if code:
            raise RuntimeError((straight / "output").read_text()[-2000:])
        persons = 0
        code = -1
        while code != 0:
            code = self._start_once(place)
            self.codes[str(code)] += 1
            if code in (2, 3):
                persons += 1
                break
            if self.starts > 20 + 3 * sum(self.counts.values()):
                break
        return Result(
            events=dict(self.counts),
            starts=self.starts,
            codes=dict(self.codes),
            steps=self.steps,
            identical=code == 0 and self.losses(place) == self.losses(straight),
            asked_for_a_person=persons,
        )

    def _start_once(self, place: Path) -> int:
        """Start the line, let something happen while it trains, and wait for its end."""
        self.starts += 1
        happened: list[str] = []
        steps = self._steps_recorded(place)
        start = Start(self.line(place), place / "output")
        try:
            trains = wait_for(
                lambda: start.poll() is not None or self._steps_recorded(place) != steps, PATIENCE_SECONDS
            )
            if not trains:
                raise RuntimeError(f"nothing is trained: {(place / 'output').read_text()[-2000:]}")
            while self.left and start.poll() is None:
                time.sleep(self.random.uniform(0, 1.5))
                kind = self.left.pop()
                self.counts[kind] += 1
                happened.append(kind)
                self.kinds()[kind](start, place)
                if wait_for(lambda: start.poll() is not None, 2.0):
                    break
            start.wait(PATIENCE_SECONDS)
            wait_for(lambda: not start.ranks(), 30)
            return start.returncode
        finally:
            start.clear()
            print(
                f"start {self.starts}: {', '.join(happened) or 'nothing happened'}; exit code {start.returncode}",
                file=sys.stderr,
            )

    def _steps_recorded(self, place: Path) -> int:
        """The newest step on record."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            return self.losses(place)[-1][0]
        return 0

    def kinds(self) -> dict[str, Callable[[Start, Path], None]]:
        """What may happen. Requeues are what follows each end."""
        return {
            "a rank is killed": self._kill_a_rank,
            "the launcher is killed": self._kill_the_launcher,
            "all are killed": lambda start, place: start.send(list(start.processes()), signal.SIGKILL),
            "the disk is full for a while": self._fill_the_disk,
            "a byte of the newest checkpoint flips": self._flip_a_byte,
            "a second start": self._start_a_second,
            "the lock of another host": self._forge_a_lock,
            "a rank stands still": self._stop_a_rank,
            "SIGTERM to all": lambda start, place: start.send(list(start.processes()), signal.SIGTERM),
            "SIGTERM to one rank": self._end_a_rank,
            "the time limit": self._let_time_pass,
        }

    def _kill_a_rank(self, start: Start, place: Path) -> None:
        start.send(self.random.sample(start.ranks(), min(1, len(start.ranks()))), signal.SIGKILL)

    def _end_a_rank(self, start: Start, place: Path) -> None:
        start.send(self.random.sample(start.ranks(), min(1, len(start.ranks()))), signal.SIGTERM)

    def _kill_the_launcher(self, start: Start, place: Path) -> None:
        start.send([start.pid], signal.SIGKILL)

    def _fill_the_disk(self, start: Start, place: Path) -> None:
        """The second rank, which writes no records, cannot write a file as large as its part of a checkpoint."""
        ranks = [each for each in start.ranks() if "RANK=1" in environment_of(each)]
        unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        with contextlib.suppress(ProcessLookupError):
            for each in ranks:
                resource.prlimit(each, resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
            wait_for(lambda: "is tried once more" in start.output.read_text()[-3000:] or start.poll() is not None, 20)
            for each in ranks:
                resource.prlimit(each, resource.RLIMIT_FSIZE, unlimited)

    def _flip_a_byte(self, start: Start, place: Path) -> None:
        start.clear()
        from jllm.train.checkpoint.folders import list_checkpoints

        found = list_checkpoints(place / "ckpt")
        if len(found) < 2:  # of a single checkpoint nothing can be taken
            return
        path = self.random.choice(sorted(found[-1].glob("*.safetensors")))
        with path.open("r+b") as file:
            file.seek(self.random.randrange(path.stat().st_size))
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1 << self.random.randrange(8)]))

    def _start_a_second(self, start: Start, place: Path) -> None:
        """It waits for the first one, and somebody who sees that ends it."""
        second = Start(self.line(place), place / "second-output")
        wait_for(lambda: "is in use" in second.output.read_text() or start.poll() is not None, 60)
        second.clear()
        second.output.unlink()

    def _forge_a_lock(self, start: Start, place: Path) -> None:
        """All are killed, and before the next start a run on another host, long gone itself, has left its lock."""
        from jllm.train.lifecycle.run_lock import PREFIX, STALE_SECONDS, Holder

        start.clear()
        for path in (place / "ckpt").glob(f"{PREFIX}*"):
            path.unlink()
        lock = place / "ckpt" / f"{PREFIX}00000900"
        theirs = dataclasses.replace(Holder.here("theirs"), host="elsewhere")
        lock.write_text(json.dumps(dataclasses.asdict(theirs)), encoding="utf-8")
        touched = time.time() - STALE_SECONDS + 10
        os.utime(lock, (touched, touched))

    def _stop_a_rank(self, start: Start, place: Path) -> None:
        ranks = start.ranks()
        if not ranks:
            return
        still = self.random.choice(ranks)
        start.send([still], signal.SIGSTOP)
        if not wait_for(lambda: len(start.ranks()) < len(ranks), 3 * TIMEOUT_SECONDS):
            raise RuntimeError("a rank stood still, and nobody ended")

    def _let_time_pass(self, start: Start, place: Path) -> None:
        """The line's own limit would take minutes; what it leads to is what `save_quit` leads to, but for the code."""
        start.send(start.ranks(), signal.SIGTERM)


def wait_for(condition: Callable[[], object], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.1)
    return False


def parent_of(process: int) -> int | None:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    return None


def environment_of(process: int) -> list[str]:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/environ").read_bytes().decode(errors="replace").split("\0")
    return []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps_per_event", type=int, default=80)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="three-weeks-") as folder:
        began = time.monotonic()
        run = ThreeWeeks(Path(folder), events=given.events, seed=given.seed, steps_per_event=given.steps_per_event)
        result = run.run()
        report: dict[str, Any] = {"benchmark": "three_weeks", **dataclasses.asdict(result)}
        report["minutes"] = round((time.monotonic() - began) / 60, 1)
        print(json.dumps(report))
        if not result.identical:
            print((Path(folder) / "place/output").read_text()[-4000:], file=sys.stderr)
    return 0 if result.identical and not result.asked_for_a_person else 1


if __name__ == "__main__":
    sys.exit(main())
