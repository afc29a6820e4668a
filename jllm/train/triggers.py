"""When to evaluate, when to save, when to stop.

What depends on this process alone (a file that appeared, a signal, the clock) is a `Request`, which all processes
exchange at each step, so that they act together or not at all. The rest is a function of the step.
"""

import datetime
import enum
import math
import os
import signal
import statistics
import threading
import time
from collections import deque
from pathlib import Path

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from jllm.errors import UserError
from jllm.train.config import TrainConfig, parse_epochs
from jllm.train.data.batching import EpochSteps
from jllm.train.distributed.launch import SIGTERM_SECONDS, asked_to_end

SIGTERM_EXIT_CODE = 143


class Request(enum.IntFlag):
    """What one process asks of all."""

    NOTHING = 0
    SAVE = 1
    QUIT = 2


class Cadence:
    """The steps at which something happens beside training.

    Args:
        config: the options.
        epochs: how many steps each epoch has.
        total_steps: of the run.
    """

    def __init__(self, config: TrainConfig, *, epochs: EpochSteps, total_steps: int) -> None:
        self._config = config
        self._epochs = epochs
        self._total_steps = total_steps
        self._included = parse_epochs(config.ckpt_epoch, "--ckpt_epoch")
        self._excluded = parse_epochs(config.skip_epoch, "--skip_epoch")

    def evaluates(self, step: int) -> bool:
        """Whether an evaluation follows step `step`: at the given steps, or parts of an epoch, and after the last."""
        every = self._config.steps_per_eval
        if step == self._total_steps:
            return True
        if every >= 1:
            return step % int(every) == 0
        share = every if every > 0 else 1.0
        _, within, count = self._epochs.locate(step)
        return int(within / (count * share) + 1e-9) > int((within - 1) / (count * share) + 1e-9)

    def saves(self, step: int) -> bool:
        """Whether a checkpoint follows step `step`, if nobody asked for one."""
        epoch, within, count = self._epochs.locate(step)
        if step <= self._config.ckpt_step_gt or epoch in self._excluded:
            return False
        if self._included and epoch not in self._included:
            return False
        every = self._config.steps_per_checkpoint
        due = step % every == 0 if every > 0 else within == count
        return due or step == self._total_steps


class EarlyStop:
    """Stops after `patience` consecutive evaluations that are worse than the one before; 0 never does.

    Attributes:
        last: the loss of the newest evaluation.
        rebounds: how many in a row were worse than the one before.
    """

    def __init__(self, patience: int) -> None:
        self._patience = patience
        self.last: float | None = None
        self.rebounds = 0

    def should_stop(self, loss: float) -> bool:
        """Tell it the loss of an evaluation."""
        rebounded = self.last is not None and loss > self.last
        self.rebounds = self.rebounds + 1 if rebounded else 0
        self.last = loss
        return bool(self._patience) and self.rebounds >= self._patience


class SpikeWatch:
    """Finds losses far above the recent ones: by more than `DEVIATIONS` robust standard deviations.

    The median and the median absolute deviation (times 1.4826, Rousseeuw and Croux 1993) of the last `WINDOW` losses
    are not moved by the spikes themselves.
    """

    WINDOW, LEAST, DEVIATIONS = 50, 20, 6.0

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=self.WINDOW)

    def check(self, step: int, loss: float) -> str | None:
        """A warning for a spike, or None."""
        warning = None
        if len(self._recent) >= self.LEAST:
            median = statistics.median(self._recent)
            spread = 1.4826 * statistics.median(abs(each - median) for each in self._recent)
            if loss > median + max(self.DEVIATIONS * spread, 0.05 * abs(median)):
                warning = f"step {step}: loss {loss:.4f} is a spike; the median of the steps before is {median:.4f}"
        if math.isfinite(loss):
            self._recent.append(loss)
        return warning


class Requests:
    """What this process asks of all: files named `save` and `save_quit` in the checkpoint folder, minutes, SIGTERM.

    A SIGTERM (SLURM's notice, sent to every process) leads to a checkpoint and an orderly end when all processes get
    one within `SIGTERM_SECONDS` of each other; a process that got it alone ends at once after that, because then
    another one has failed and the launcher is ending the rest. Where the launcher got it too and is gone, the ranks
    save all the same (`jllm.train.distributed.launch`).
    """

    def __init__(self, config: TrainConfig, *, is_first: bool, world_size: int) -> None:
        self._root: Path | None = config.checkpoint if is_first else None
        self._minutes = config.minutes_per_checkpoint if is_first else 0.0
        self._saved_at = time.monotonic()
        self._world_size = world_size
        self._agreed = threading.Event()

    def listen(self) -> None:
        """Take SIGTERM from now on, in a thread: the main one may be inside a collective operation for long."""
        if threading.current_thread() is not threading.main_thread():
            return
        received, sent = os.pipe()
        os.set_blocking(sent, False)
        signal.set_wakeup_fd(sent, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, lambda number, frame: None)  # what is told to the thread, at once
        threading.Thread(target=self._await_sigterm, args=(received,), name="sigterm", daemon=True).start()

    def _await_sigterm(self, received: int) -> None:
        while os.read(received, 1) != bytes([signal.SIGTERM]):
            pass
        asked_to_end.set()
        self._agree_to_end()

    def _agree_to_end(self) -> None:
        deadline = time.monotonic() + SIGTERM_SECONDS
        try:
            # The first process has the store; where it is gone, there is nobody to agree with.
            store = TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=False,
                timeout=datetime.timedelta(seconds=SIGTERM_SECONDS),
            )
            count = store.add("jllm/sigterm", 1)
            while count < self._world_size and time.monotonic() < deadline:
                time.sleep(0.1)
                count = store.add("jllm/sigterm", 0)
        except RuntimeError:
            count = 0
        if count >= self._world_size:
            self._agreed.set()
        else:
            os._exit(SIGTERM_EXIT_CODE)

    def now(self) -> Request:
        """This process's wishes at this step."""
        wishes = Request.NOTHING
        if self._agreed.is_set():
            wishes |= Request.SAVE | Request.QUIT
        if self._root is not None:
            for name, wish in (("save", Request.SAVE), ("save_quit", Request.SAVE | Request.QUIT)):
                if (self._root / name).is_file():
                    (self._root / name).unlink(missing_ok=True)
                    wishes |= wish
        if self._minutes and time.monotonic() - self._saved_at >= 60 * self._minutes:
            wishes |= Request.SAVE
        return wishes

    @property
    def ending(self) -> bool:
        """Whether the run ends because of SIGTERM, with no time for more than a checkpoint."""
        return self._agreed.is_set()

    def saved(self) -> None:
        """A checkpoint has just begun: the minutes count from here."""
        self._saved_at = time.monotonic()


class NanGuard:
    """What happens when a loss or gradient is not finite; the weights are never touched by such a step.

    Args:
        policy: `--on_nan`.
        patience: how many in a row are skipped before the run stops anyway.
    """

    def __init__(self, policy: str, patience: int = 10) -> None:
        self._policy, self._patience, self._in_a_row = policy, patience, 0

    def check(self, step: int, loss: float, norm: float) -> str | None:
        """A warning for a step that was skipped, or None for a good one.

        Raises:
            UserError: the policy is to stop, or too many steps in a row were bad.
        """
        finite = all(value == value and abs(value) != float("inf") for value in (loss, norm))
        if finite:
            self._in_a_row = 0
            return None
        self._in_a_row += 1
        what = f"step {step}: loss {loss}, gradient norm {norm}"
        if self._policy == "stop":
            raise UserError(
                f"{what}: stopped, the weights are those before it; look at its data, lower --learning_rate, or give"
                " --on_nan skip"
            )
        if self._in_a_row >= self._patience:
            raise UserError(f"{what}: {self._in_a_row} such steps in a row; lower --learning_rate")
        return f"{what}: skipped, the weights stay as they were"
