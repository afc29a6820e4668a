"""What an objective is, and the one that is in use on a last stage.

An objective returns a sum over the trained tokens of a micro-batch. For one optimizer step over the whole world the
loss is (sum of these) / (number of trained tokens; of preference pairs with a loss of these), however the tokens fall
on micro-batches and ranks. DeepSpeed
divides what the last stage returns by the number of micro-batches and averages over data-parallel ranks, in the
gradient and in the reported loss alike; `step_scale` multiplies by both beforehand, so the two cancel and what is left
is the sum over the step divided by its trained tokens.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from jllm.models.pipeline.head import Head


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sums:
    """What an objective makes of a micro-batch.

    Attributes:
        loss: scalar, fp32, to be differentiated.
        reported: numbers by name, scalars or [N], to be added up over micro-batches and processes; whole ones, but for
            those of pairs.
    """

    loss: Tensor
    reported: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)


class Objective(Protocol):
    """Final hidden states → sums."""

    def __call__(self, hidden: Tensor, head: Head, fields: Mapping[str, Tensor], gradient: float | None = None) -> Sums:
        """The sums of a micro-batch.

        Args:
            hidden: [B, S, width] of any float type: what `head` takes.
            head: gives the logits of any part of it.
            fields: the named integer planes [B, S] of the micro-batch.
            gradient: the one that the loss will be given in the backward pass, where that is known.
        """


def step_scale(*, terms: int, micro_batches: int, data_parallel_size: int) -> float:
    """What a sum is multiplied with in a step that has this many trained tokens, or pairs, in the whole world."""
    return micro_batches * data_parallel_size / max(terms, 1)


class ObjectiveInUse:
    """What a last stage calls: an objective, the scale of the step, and what is reported since they were set."""

    def __init__(self, objective: Objective) -> None:
        self.use(objective)

    def use(self, objective: Objective, *, scale: float = 1.0, gradient: float | None = None) -> None:
        """The next forward passes compute this; without a scale they return plain sums.

        `gradient` is the one that the scaled sum will be given in the backward pass, where that is known.
        """
        self._objective, self._scale = objective, scale
        self._gradient = None if gradient is None else gradient * scale
        self._reported: dict[str, Tensor] = {}

    def reported(self, name: str) -> int:
        """The sum of this name since `use`, waiting for the device; 0 on stages that have no objective."""
        return sum(self.all_reported(name, 1))

    def all_reported(self, name: str, count: int) -> list[Any]:
        """The same for one that has `count` numbers."""
        found = self._reported.get(name)
        return [0] * count if found is None else found.reshape(count).tolist()

    def __call__(self, hidden: Tensor, head: Head, fields: Mapping[str, Tensor]) -> Tensor:
        """The scaled sum of a micro-batch, to be differentiated."""
        sums = self._objective(hidden, head, fields, self._gradient)
        for name, value in sums.reported.items():
            known = self._reported.get(name)
            self._reported[name] = value if known is None else known + value
        # Filled in by the device: a number that is copied there makes the host wait for all that comes before.
        return sums.loss * torch.full((), self._scale, dtype=torch.float32, device=sums.loss.device)
