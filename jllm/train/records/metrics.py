"""Records of a run: console lines, `metrics.jsonl`, TensorBoard, services.

`metrics.jsonl` has one JSON object a line, each with its `time` (ISO 8601, UTC). Training records have `step` (from 1),
`epoch`, `loss`, `lr`, `grad_norm`, `tokens` (of the step, over the whole world), `trained_tokens`,
`tokens_per_second`, `mfu` (null where the device's peak is not known), `memory_mib` (peak of each stage, the largest
over its pipelines), `data_wait` (share of the step's time in which the reader was waited for), `seconds`,
`consumed_tokens` and `consumed_rows`; with adapters also `_avg`, `_min` and `_max` over all of them of what
`jllm.train.optim.after_step` tells: `lora_norm` (Frobenius, of alpha / r x BA), `lora_decay` (what the decay took of
the norm of BA in this step), `control_lambda` (the largest change along a direction), `control_skew` (how far
directions are from orthonormal), `control_decay`; of preference pairs `pairs` (of the step), `rewards/chosen`,
`rewards/rejected`, `rewards/margins`, `rewards/accuracies` (the share of pairs whose chosen answer has the larger
reward), `logps/chosen` and `logps/rejected`; a step of `--skip_train_steps` has no loss. Evaluation records have
`step` (0: before training), `name` (of the set), `eval_loss`, `eval_tokens`, `perplexity`, `accuracy`, `seconds` and
more of `jllm.train.evaluate`; of pairs `eval_pairs` and the same as in training. Events have `event`, what happened,
and `step`, the last one that was made. A resumed run goes on in the same file, after the records of steps it is about
to repeat are dropped; events stay. A step that ends the run because its loss or gradient is not finite is recorded too;
NaN and infinity are text.

Only the first process records; on the others every method does nothing. No sink ends a run: a full disk is waited for,
and a service that is away is passed over.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jllm.train.records.appended_file import AppendedFile
from jllm.train.records.console import Display, time_stamp
from jllm.train.records.metrics_file import METRICS_NAME, drop_from_step, line_of
from jllm.train.records.sinks.reporter import CLOSE_SECONDS, HURRY_SECONDS, Reporter
from jllm.train.records.sinks.tensorboard import Board

WARNING = "warning: "
_OF_ADAPTERS = {
    "lora_norm_avg": "norm of BA",
    "lora_decay_avg": "its decay",
    "control_lambda_max": "largest lambda",
    "control_skew_max": "skew",
}
"""What of adapters the console says → how."""
ESTIMATE_STEPS = 5
"""After so many steps the run says how long it takes; the first one, in which things are set up, does not count."""


class Recorder:
    """Writes the records of a run.

    Args:
        folder: where the files go; None keeps to the console and the services.
        enabled: whether this process records.
        total_steps: for the console line.
        first_step: the first step this run makes; records of it and later ones, left by an earlier run, are dropped.
        steps_per_print: steps between two console lines.
        evaluates_first: whether an evaluation precedes the first step of a run that goes on; its records, left by an
            earlier start that did not come to its end, are dropped.
        reporters: services that get the numbers too.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        enabled: bool,
        total_steps: int,
        first_step: int,
        steps_per_print: int,
        evaluates_first: bool = False,
        reporters: Sequence[Reporter] = (),
    ) -> None:
        self._total_steps = total_steps
        self._steps_per_print = steps_per_print
        self._started = time.monotonic()
        self._display = Display(total_steps=total_steps, first_step=first_step) if enabled else None
        self._first_step = first_step
        self._timed_from = self._started
        self._file: AppendedFile | None = None
        self._board: Board | None = None
        self._reporters = reporters if enabled else ()
        self._step = first_step - 1
        if enabled and folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / METRICS_NAME
            drop_from_step(path, first_step, evaluates_first=evaluates_first or first_step == 1)
            self._file = AppendedFile(path, self.warn)
            self._board = self._tensorboard(folder)

    def _tensorboard(self, folder: Path) -> Board | None:
        try:
            return Board(folder, self._first_step, self.warn)
        except ImportError:
            self.say("TensorBoard is not installed (pip install tensorboard): metrics.jsonl is written alone")
            return None

    def say(self, line: str) -> None:
        """A line on the console; one that begins with "warning: " is an event too."""
        if line.startswith(WARNING):
            self.warn(line.removeprefix(WARNING))
        elif self._display is not None:
            self._display.say(line)

    def event(self, name: str, line: str | None = None, *, step: int | None = None, **facts: Any) -> None:
        """Something that happened to the run.

        Args:
            name: what it is.
            line: for the console; None where it is not said there.
            step: the last step that was made, where that is not the newest that was recorded.
            facts: more of it, as JSON values.
        """
        if self._display is None:
            return
        if line is not None:
            self._display.say(line)
        self._write({"event": name, "step": self._step if step is None else step, **facts})

    def warn(self, line: str) -> None:
        """An event that is a warning."""
        self.event("warning", f"{WARNING}{line}", message=line)

    def artefact(self, kind: str, folder: Path, *, step: int) -> None:
        """A checkpoint or model that is complete, of this step; services that know such things are told."""
        for reporter in self._reporters:
            reporter.artefact(kind, folder, step=step)

    def train(self, record: dict[str, Any]) -> None:
        """A training step."""
        if self._display is None:
            return
        step, facts = record["step"], self._facts(record)
        self._step = step
        self._write(record)
        self._display.step(step, facts[0])
        if step % self._steps_per_print == 0 or step == self._total_steps:
            self._display.say("  ".join((f"step {step}/{self._total_steps}", *facts)))
        if step == self._first_step + ESTIMATE_STEPS - 1 and step < self._total_steps:
            left = clock(self._left(step, record["seconds"]))
            self._display.say(
                f"about {left} to go for the other {self._total_steps - step:,} steps, at the pace so far"
            )

    def _facts(self, record: dict[str, Any]) -> list[str]:
        """What the console says of a step, the loss first."""
        elapsed = time.monotonic() - self._started
        skipped = record["loss"] is None
        parts = [
            "skipped" if skipped else f"loss {record['loss']:.4f}",
            f"epoch {record['epoch']:.2f}",
            f"lr {record['lr']:.3g}",
            "" if skipped else f"grad norm {record['grad_norm']:.3f}",
            *_pairs(record),
            *(f"{label} {record[key]:.3g}" for key, label in _OF_ADAPTERS.items() if key in record),
            f"{record['tokens_per_second']:,.0f} tokens/s",
            f"MFU {100 * record['mfu']:.1f}%" if record["mfu"] is not None else "",
            f"data wait {100 * record['data_wait']:.1f}%",
            f"memory {max(record['memory_mib']) / 1024:.1f} GiB",
            f"elapsed {clock(elapsed)}",
            f"left {clock(self._left(record['step'], record['seconds']))}",
        ]
        return [part for part in parts if part]

    def _left(self, step: int, seconds: float) -> float:
        """The seconds from `step`, which took `seconds`, to the last one, at the pace since the end of the first step.

        Evaluations and checkpoints between steps count, what came before the first step and that step do not.
        """
        now = time.monotonic()
        if step == self._first_step:
            self._timed_from = now
            return seconds * (self._total_steps - step)
        return (now - self._timed_from) / (step - self._first_step) * (self._total_steps - step)

    def evaluation(self, record: dict[str, Any]) -> None:
        """An evaluation."""
        if self._display is None:
            return
        self._write(record)
        when = f"after step {record['step']}/{self._total_steps}" if record["step"] else "before the first step"
        if "eval_pairs" in record:
            facts, over = _pairs(record), f"{record['eval_pairs']:,} pairs"
        else:
            facts = [f"perplexity {record['perplexity']:.3f}", f"accuracy {100 * record['accuracy']:.2f}%"]
            over = f"{record['eval_tokens']:,} tokens"
        self.say(
            "  ".join(
                (
                    f"evaluation on {record['name']} {when}",
                    f"loss {record['eval_loss']:.4f}",
                    *facts,
                    f"{over} in {record['seconds']:.1f} s",
                )
            )
        )

    def _write(self, record: dict[str, Any]) -> None:
        record = {"time": time_stamp("milliseconds"), **record}
        if self._file is not None:
            self._file.append(line_of(record).encode())
        if self._board is not None:
            self._board.numbers(record)
        for reporter in self._reporters:
            reporter.numbers(record)
            self._warn_of(reporter)

    def _warn_of(self, reporter: Reporter) -> None:
        for problem in reporter.take_problems():
            self.warn(problem)

    @contextlib.contextmanager
    def until_the_end(self) -> Iterator[None]:
        """Record, for a run that ends by an error, that it does, and close everything in any case."""
        try:
            yield
        except BaseException as error:
            message = " ".join(f"{error}".split()) or type(error).__name__
            self.event("end", reason="error", exit_code=getattr(error, "exit_code", 1), message=message)
            self.close(waits=False)
            raise
        self.close()

    def close(self, *, waits: bool = True) -> None:
        """Write what waits, and close the files; a second time it does nothing.

        Args:
            waits: for services that are slow, `CLOSE_SECONDS` in all, or `HURRY_SECONDS` only.
        """
        deadline = time.monotonic() + (CLOSE_SECONDS if waits else HURRY_SECONDS)
        for reporter in self._reporters:
            reporter.finish()
        for reporter in self._reporters:
            reporter.wait(deadline - time.monotonic())
            self._warn_of(reporter)
        for sink in (self._board, self._file, self._display):
            if sink is not None:
                sink.close()
        self._reporters, self._board, self._file, self._display = (), None, None, None


def _pairs(record: dict[str, Any]) -> list[str]:
    """What the console says of preference pairs; nothing of other rows."""
    if "rewards/margins" not in record:
        return []
    return [
        f"right {100 * record['rewards/accuracies']:.1f}%",
        f"margin {record['rewards/margins']:.3f}",
        f"rewards {record['rewards/chosen']:.3f} {record['rewards/rejected']:.3f}",
        f"logps {record['logps/chosen']:.1f} {record['logps/rejected']:.1f}",
    ]


def clock(seconds: float) -> str:
    """3723 → "1:02:03"; less than an hour → "2:03"."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
