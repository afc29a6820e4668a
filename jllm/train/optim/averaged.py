"""Schedule-free optimizers train at one point and are evaluated at another, the average of where they have been.

With x the average, z the point of the plain optimizer, and y = (1 - beta1) z + beta1 x the point of the gradients
(Defazio et al., The Road Less Scheduled, 2024): the weights are y while training goes on, and in checkpoints; x is what
is evaluated and exported.

Guarantees: an evaluation leaves y as it was, bit by bit. Cost: a copy of what trains, while x is there.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


@contextlib.contextmanager
def averaged(engine: Any) -> Iterator[None]:
    """Inside it the engine's weights are those to be evaluated and exported; other optimizers' are the same ones."""
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    if not hasattr(optimizer, "eval"):
        yield
        return
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kept = [parameter.detach().clone() for parameter in trained]
    optimizer.eval()
    _refresh(engine)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(trained, kept, strict=True):
                parameter.copy_(value)
        for group in optimizer.param_groups:
            group["train_mode"] = True
        _refresh(engine)


def average(y: Tensor, z: Tensor, beta1: float) -> Tensor:
    """x, from the two points that a checkpoint has; fp32."""
    return y.float().lerp(z.float(), 1 - 1 / beta1)


def _refresh(engine: Any) -> None:
    """With masters, give the weights what these are now."""
    refresh = getattr(engine.optimizer, "update_lp_params", None)
    if refresh is not None:
        refresh()
