"""Learning-rate schedules.

A schedule is a pure function of the step, so a resumed run needs no state for it. Steps count from 1; the first step
never has a learning rate of 0, and the last warm-up step has the full rate.
"""

import math
from collections.abc import Callable

import torch

from jllm.errors import UserError
from jllm.train.config import TrainConfig

RATE_FACTOR = "rate_factor"
"""What a parameter group's learning rate is multiplied with, beside the schedule."""


def warmup_steps(config: TrainConfig, total_steps: int) -> int:
    """`--num_warmup_steps`: steps where at least 1, a share of all steps where below 1."""
    given = config.num_warmup_steps
    steps = int(given) if given >= 1 else math.ceil(given * total_steps)
    if steps > total_steps:
        raise UserError(f"--num_warmup_steps {given:g} is more than the {total_steps} steps of this run; give fewer")
    return steps


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """The learning rate of step `step` (from 1) of `total_steps`.

    Warm-up rises linearly to the full rate at its last step, except for `constant`, which has none, and `rms_ratio`,
    which is one: the full rate times sqrt((1 - beta2^step) / (1 + beta2^step)). What follows is a
    function of p, the share of the remaining steps already done (0 at the first step after warm-up):
    linear 1 - p, polynomial (1 - p)^2, cosine (1 + cos(pi p)) / 2, cosine_with_restarts the same over p * cycles mod 1,
    each scaled between `--lr_min` and the full rate. `--force_constant_lr` is the rate of every step from here on.
    """
    peak, floor = config.learning_rate, config.lr_min
    kind = config.lr_scheduler_type
    if config.force_constant_lr is not None:
        return config.force_constant_lr
    if kind == "rms_ratio":
        forgotten = config.adam_beta2**step
        return max(floor, peak * math.sqrt((1 - forgotten) / (1 + forgotten)))
    if kind == "constant":
        return peak
    warmup = warmup_steps(config, total_steps)
    if step <= warmup:
        return peak * step / warmup
    done = (step - 1 - warmup) / max(total_steps - warmup, 1)
    shapes: dict[str, Callable[[float], float]] = {
        "constant_with_warmup": lambda p: 1.0,
        "linear": lambda p: 1.0 - p,
        "polynomial": lambda p: (1.0 - p) ** 2,
        "cosine": lambda p: (1.0 + math.cos(math.pi * p)) / 2,
        "cosine_with_restarts": lambda p: (1.0 + math.cos(math.pi * ((p * config.lr_cycles) % 1.0))) / 2,
    }
    return floor + (peak - floor) * shapes[kind](min(done, 1.0))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Give every parameter group this rate, times its factor."""
    for group in optimizer.param_groups:
        group["lr"] = value * group.get(RATE_FACTOR, 1.0)
