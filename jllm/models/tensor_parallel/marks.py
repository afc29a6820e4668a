"""What is said of the parameters of a stage in slices: who has the same, and whose gradients are parts of a sum.

A slice says itself what of its whole tensor it is (`jllm.parallel.tensor.slices`).
"""

from typing import Any

from torch import nn

from jllm.parallel.tensor.group import TensorGroup
from jllm.parallel.tensor.slices import slice_of

_SHARED, _PARTIAL = "jllm_shared_over", "jllm_partial_over"


def mark_repeats(model: nn.Module, group: TensorGroup) -> None:
    """Say of every parameter whether another rank of the group acts for it."""
    for parameter in model.parameters():
        is_whole, is_shared = slice_of(parameter) is None, hasattr(parameter, _SHARED)
        repeats = not group.leads if is_whole else is_shared and not group.leads_sharers
        parameter.jllm_repeats = repeats  # type: ignore[attr-defined]


def repeats(parameter: nn.Parameter) -> bool:
    """Whether another rank of the tensor group has the same elements, and acts for all that have."""
    return getattr(parameter, "jllm_repeats", False)


def partial_gradient(parameter: nn.Parameter) -> Any:
    """The process group over which the gradients of a parameter have to be summed; None for most."""
    return getattr(parameter, _SHARED, getattr(parameter, _PARTIAL, None))


def mark_shared(parameter: nn.Parameter, sharing: Any) -> None:
    """Say that the ranks of a process group have the same slice of a parameter, and each a part of its gradient."""
    setattr(parameter, _SHARED, sharing)


def mark_partial(parameter: nn.Parameter, handle: Any) -> None:
    """Say that the ranks of a process group have the same parameter, and each a part of its gradient."""
    setattr(parameter, _PARTIAL, handle)
