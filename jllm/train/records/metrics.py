"""Records of a run: a console line, `metrics.jsonl`, TensorBoard.

`metrics.jsonl` has one JSON object a line. Training records have `step` (from 1), `epoch`, `loss`, `lr`, `grad_norm`,
`tokens` (of the step, over the whole world), `trained_tokens`, `tokens_per_second`, `mfu` (null where the device's peak
is not known), `memory_mib` (peak of each stage, the largest over its pipelines), `data_wait` (share of the step's time
in which the reader was waited for), `seconds`, `consumed_tokens` and `consumed_rows`; a step of `--skip_train_steps`
has no loss. Evaluation records have `step` (0: before training), `name` (of the set), `eval_loss`, `eval_tokens`,
`perplexity`, `accuracy` and `seconds`. A resumed run goes on in the same file, after the lines of steps it is about to
repeat are dropped. A step that ends the run because its loss or gradient is not finite is recorded too; NaN and
infinity are text.

Only the first process records; on the others every method does nothing.
"""

import json
import math
import time
from pathlib import Path
from typing import Any

from jllm import atomic
from jllm.train.records.console import Display

METRICS_NAME = "metrics.jsonl"
ESTIMATE_STEPS = 5
"""After so many steps the run says how long it takes; the first one, in which things are set up, does not count."""


class Recorder:
    """Writes the records of a run.

    Args:
        folder: where the files go; None keeps to the console.
        enabled: whether this process records.
        total_steps: for the console line.
        first_step: the first step this run makes; records of it and later ones, left by an earlier run, are dropped.
        steps_per_print: steps between two console lines.
    """

    def __init__(
        self, folder: Path | None, *, enabled: bool, total_steps: int, first_step: int, steps_per_print: int
    ) -> None:
        self._total_steps = total_steps
        self._steps_per_print = steps_per_print
        self._started = time.monotonic()
        self._display = Display(total_steps=total_steps, first_step=first_step) if enabled else None
        self._first_step = first_step
        self._timed_from = self._started
        self._file: Any = None
        self._board: Any = None
        if enabled and folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / METRICS_NAME
            _drop_from_step(path, first_step)
            self._file = path.open("a", encoding="utf-8")
            self._board = _tensorboard(folder, first_step)

    def say(self, line: str) -> None:
        """A line on the console."""
        if self._display is not None:
            self._display.say(line)

    def train(self, record: dict[str, Any]) -> None:
        """A training step."""
        if self._display is None:
            return
        self._write(record)
        self._scalars("train", record, ("loss", "lr", "grad_norm", "tokens_per_second", "mfu", "data_wait"))
        step, facts = record["step"], self._facts(record)
        self._display.step(step, facts[0])
        if step % self._steps_per_print == 0 or step == self._total_steps:
            self._display.say("  ".join((f"step {step}/{self._total_steps}", *facts)))
        if step == self._first_step + ESTIMATE_STEPS - 1 and step < self._total_steps:
            left = clock(self._left(step, record["seconds"]))
            self._display.say(
                f"about {left} to go for the other {self._total_steps - step:,} steps, at the pace so far"
            )
        if self._board is not None and not all(map(_is_finite, record.values())):
            self._board.flush()  # the run may end here, by an error

    def _facts(self, record: dict[str, Any]) -> list[str]:
        """What the console says of a step, the loss first."""
        elapsed = time.monotonic() - self._started
        skipped = record["loss"] is None
        parts = [
            "skipped" if skipped else f"loss {record['loss']:.4f}",
            f"epoch {record['epoch']:.2f}",
            f"lr {record['lr']:.3g}",
            "" if skipped else f"grad norm {record['grad_norm']:.3f}",
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
        self._scalars(f"eval/{record['name']}", record, ("eval_loss", "perplexity", "accuracy"))
        when = f"after step {record['step']}/{self._total_steps}" if record["step"] else "before the first step"
        self._display.say(
            f"evaluation on {record['name']} {when}  loss {record['eval_loss']:.4f}"
            f"  perplexity {record['perplexity']:.3f}  accuracy {100 * record['accuracy']:.2f}%"
            f"  {record['eval_tokens']:,} tokens in {record['seconds']:.1f} s"
        )

    def _write(self, record: dict[str, Any]) -> None:
        if self._file is not None:
            finite = {key: _finite(value) for key, value in record.items()}
            self._file.write(json.dumps(finite) + "\n")
            self._file.flush()

    def _scalars(self, prefix: str, record: dict[str, Any], names: tuple[str, ...]) -> None:
        if self._board is not None:
            for name in (name for name in names if record[name] is not None):
                self._board.add_scalar(f"{prefix}/{name.removeprefix('eval_')}", record[name], record["step"])

    def close(self) -> None:
        """Flush and close the files."""
        if self._display is not None:
            self._display.close()
        for sink in (self._file, self._board):
            if sink is not None:
                sink.close()


def clock(seconds: float) -> str:
    """3723 → "1:02:03"; less than an hour → "2:03"."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _finite(value: Any) -> Any:
    """JSON has no NaN: such a value is written as text."""
    return value if _is_finite(value) else str(value)


def _drop_from_step(path: Path, first_step: int) -> None:
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # the line that was being written when the run died
            continue
        if record["step"] < first_step and (first_step > 1 or "eval_loss" not in record):
            kept.append(line + "\n")
    atomic.write_text(path, "".join(kept))


def _tensorboard(folder: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("TensorBoard is not installed (pip install tensorboard): metrics.jsonl is written alone", flush=True)
        return None
    return SummaryWriter(log_dir=str(folder), purge_step=first_step)
