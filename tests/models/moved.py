"""Two ways to compute a model whose numbers are all moved, so that nothing is right because it does nothing."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.models.family_check import load_whole

LIMIT = 1e-4
"""Of losses and gradients, relative."""
SMALL = 3e-3
"""Of the largest gradient: what is smaller may be rounding alone, and is compared with this."""


ROUNDING, TIMES, MOST = 1e-7, 4, 1e-3
"""About half a unit in the last place of fp32; what it changes is counted so many times, up to so much."""
Limits = Mapping[str, float]


class DiffersError(Exception):
    """Says what differs."""


@torch.no_grad()
def move_weights(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model with every number changed a little, buffers that are stored included; it is saved in `folder`."""
    torch.manual_seed(1)
    for tensor in {id(each): each for each in model.state_dict().values()}.values():
        if tensor.is_floating_point():
            tensor.add_(0.1 * torch.randn_like(tensor))
    model.save_pretrained(folder)
    return load_whole(folder)


def limits_of(model: PreTrainedModel, gradients: dict[str, Tensor], again: Callable[[], dict[str, Tensor]]) -> Limits:
    """How much each gradient may differ: as much as when the weights are rounded otherwise, where that is more.

    Some families magnify what rounds differently. Nothing may differ by more than `MOST`. The model's weights change.

    Args:
        model: that has these gradients.
        gradients: of its parameters.
        again: computes them again.
    """
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + ROUNDING * torch.randn_like(parameter))
    others, least = again(), _least(gradients)
    noise = {name: relative(each, others[name], least) for name, each in gradients.items()}
    return {name: max(LIMIT, min(MOST, TIMES * each)) for name, each in noise.items()}


def relative(one: Tensor, other: Tensor, least: float) -> float:
    """How far a gradient is from another, in units of its largest element; one of a smaller than `least` in these."""
    return float((one - other).abs().max() / max(float(one.abs().max()), least))


def _least(gradients: dict[str, Tensor]) -> float:
    return SMALL * max(float(each.abs().max()) for each in gradients.values())


def difference_of(
    expected: tuple[Tensor, dict[str, Tensor]],
    found: tuple[Tensor, dict[str, Tensor]],
    limits: Limits | None = None,
) -> float:
    """Of losses and gradients, relative.

    Args:
        expected, found: a loss, and gradients by name.
        limits: of gradients; None for `LIMIT`.

    Raises:
        DiffersError: it is too large.
    """
    (loss, gradients), (other_loss, others) = expected, found
    worst = ((loss - other_loss).abs() / loss.abs()).item()
    if worst > LIMIT:
        raise DiffersError(f"the loss differs by {worst:.0e}")
    if absent := gradients.keys() ^ others.keys():
        raise DiffersError(f"only one side has a gradient of {sorted(absent)[0]}")
    least = _least(gradients)
    for name, gradient in gradients.items():
        off = relative(gradient, others[name], least)
        if off > (limits or {}).get(name, LIMIT):
            raise DiffersError(f"the gradient of {name} differs by {off:.0e}")
        worst = max(worst, off)
    return worst
