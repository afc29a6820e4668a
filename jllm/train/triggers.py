"""When to evaluate, when to save, when to stop: what follows from the step and its numbers, alike on all processes.

What depends on one process alone is a request (`jllm.train.lifecycle.requests`).
"""

import math
import statistics
from collections import deque

from jllm.train.config import TrainConfig, parse_epochs, skipped_steps
from jllm.train.data.batching import EpochSteps
from jllm.train.lifecycle.ending import StoppedError


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

    def unwatched(self, step: int) -> list[str]:
        """A warning for each of `--trace_step` and `--profile_step` that does not come after step `step`."""
        found = []
        for name in ("trace_step", "profile_step"):
            wanted = getattr(self._config, name)
            if wanted is None:
                continue
            if not step < wanted <= self._total_steps:
                steps = f"{step + 1:,} to {self._total_steps:,}" if step < self._total_steps else "all done"
                found.append(f"--{name} {wanted} is no step of this run, whose steps are {steps}: nothing is written")
            elif wanted in skipped_steps(self._config):
                found.append(f"--{name} {wanted} is one of --skip_train_steps: nothing is written")
        return found


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
        return self.stops

    @property
    def stops(self) -> bool:
        """Whether the evaluations so far are a reason to stop."""
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


class NanGuard:
    """What happens when a loss or gradient is not finite; the weights are never touched by such a step.

    Args:
        policy: `--on_nan`.
        patience: how many in a row are skipped before the run stops anyway.
    """

    def __init__(self, policy: str, patience: int = 10) -> None:
        self._policy, self._patience, self._in_a_row = policy, patience, 0

    @property
    def is_good(self) -> bool:
        """Whether the newest step was one."""
        return self._in_a_row == 0

    def check(self, step: int, loss: float, norm: float) -> str | None:
        """A warning for a step that was skipped, or None for a good one.

        Raises:
            StoppedError: the policy is to stop, or too many steps in a row were bad.
        """
        finite = all(value == value and abs(value) != float("inf") for value in (loss, norm))
        if finite:
            self._in_a_row = 0
            return None
        self._in_a_row += 1
        what = f"step {step}: loss {loss}, gradient norm {norm}"
        if self._policy == "stop":
            raise StoppedError(
                f"{what}: stopped, the weights are those before it; look at its data, lower --learning_rate, or give"
                " --on_nan skip"
            )
        if self._in_a_row >= self._patience:
            raise StoppedError(f"{what}: {self._in_a_row} such steps in a row; lower --learning_rate")
        return f"{what}: skipped, the weights stay as they were"
