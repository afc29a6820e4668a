"""Where a run is between two steps, with the states of a process's random-number generators."""

import dataclasses

import torch
from deepspeed.accelerator import get_accelerator

from jllm.train.data.loader import Cursor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Position:
    """Where a run is between two steps: steps made, data consumed, and what random numbers come next."""

    step: int
    cursor: Cursor
    consumed_tokens: int
    consumed_rows: int
    random_states: dict[str, torch.Tensor]


def random_states() -> dict[str, torch.Tensor]:
    """The states of this process's random-number generators."""
    states = {"cpu": torch.get_rng_state()}
    if get_accelerator().device_name() != "cpu":
        states["device"] = get_accelerator().get_rng_state()
    return states


def restore_random_states(states: dict[str, torch.Tensor]) -> None:
    """The inverse of `random_states`."""
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "device" in states and get_accelerator().device_name() != "cpu":
        get_accelerator().set_rng_state(states["device"])
