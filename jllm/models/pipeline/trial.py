"""Passes through a layer that only show whether it works: nothing is kept of them.

What counts passes, or adds to their gradients, asks `is_trial` and leaves them out. Random numbers go on after a trial
as if it had not been, and what it saves for its backward pass is no business of hooks that wait for saved tensors.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

_running = 0


def is_trial() -> bool:
    """Whether the pass that runs now is only tried."""
    return _running > 0


@contextlib.contextmanager
def trial(device: torch.device) -> Iterator[None]:
    """Inside it a layer on `device` may run forward and backward, and nobody counts it."""
    global _running
    devices = [device] if device.type == "cuda" else []
    _running += 1
    try:
        with torch.random.fork_rng(devices=devices), torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
            yield
    finally:
        _running -= 1


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
