"""Control adapters on a whole transformers model, written as the formula is: what stages have to equal."""

from typing import Any

import torch
from torch import Tensor, nn


class WholeControl:
    """Hooks on the decoder layers of a model. Each forward pass needs `classes` [B, S] first.

    Args:
        model: of transformers; it is frozen.
        values: layer's dotted name → (Q [width, rank], s [rank]).
    """

    def __init__(self, model: nn.Module, values: dict[str, tuple[Tensor, Tensor]]) -> None:
        model.requires_grad_(False)
        self.classes: Tensor | None = None
        self.parameters: dict[str, nn.Parameter] = {}
        for name, (directions, strengths) in values.items():
            q, s = nn.Parameter(directions.clone()), nn.Parameter(strengths.clone())
            self.parameters |= {f"{name}.control_Q": q, f"{name}.control_S": s}
            model.get_submodule(name).register_forward_hook(self._hook(q, s), with_kwargs=True)

    def _hook(self, q: Tensor, s: Tensor) -> Any:
        def change(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            x = args[0] if args else kwargs["hidden_states"]
            y = output[0] if isinstance(output, (tuple, list)) else output
            assert self.classes is not None
            matrices = {
                1: q @ torch.diag(torch.exp(s) - 1) @ q.T,
                -1: q @ torch.diag(torch.exp(-s) - 1) @ q.T,
            }
            changed = y
            for kind, matrix in matrices.items():
                changed = changed + (self.classes == kind)[..., None] * ((y - x) @ matrix.T)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return change
