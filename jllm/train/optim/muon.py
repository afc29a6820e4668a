"""Muon in the type of the weights that it updates.

torch's own iterates in bf16 whatever it is given, which leaves three digits of an update. Here fp32 weights have
updates in fp32, and a run on another layout agrees with the first as it does with any other optimizer; bf16 weights
have torch's updates, bit for bit. Momentum, weight decay and rates are torch's.

Guarantees: what is kept for a parameter, and its names, are `torch.optim.Muon`'s.
Cost: an update in fp32 takes twice what torch's takes on a processor that multiplies bf16: fifteen products of the size
of the matrix, which a step's own products with thousands of tokens outweigh. In bf16 the same.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import Muon


class TypedMuon(Muon):
    """See the module. Rates are for AdamW (`match_rms_adamw`), so that one schedule serves both."""

    def __init__(self, groups: list[dict[str, Any]], *, lr: float) -> None:
        super().__init__(groups, lr=lr, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update."""
        assert closure is None
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(weight.grad)
                average = state["momentum_buffer"].lerp_(weight.grad, 1 - momentum)
                ahead = weight.grad.lerp(average, momentum)
                update = nearly_orthogonal(ahead, group["ns_coefficients"], group["ns_steps"], group["eps"])
                weight.mul_(1 - rate * group["weight_decay"])
                weight.add_(update, alpha=-0.2 * rate * math.sqrt(max(weight.shape)))


def nearly_orthogonal(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """A matrix with all its singular values brought near 1, by Newton and Schulz's iteration in its own type."""
    a, b, c = coefficients
    is_tall = matrix.shape[0] > matrix.shape[1]
    found = matrix.T if is_tall else matrix  # products of the shorter side are the smaller ones
    found = found / found.norm().clamp(min=eps)
    for _ in range(steps):
        squared = found @ found.T
        found = torch.addmm(found, torch.addmm(squared, squared, squared, beta=b, alpha=c), found, beta=a)
    return found.T if is_tall else found
