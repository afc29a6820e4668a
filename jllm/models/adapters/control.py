"""Control adapters: what each decoder layer adds to its input is scaled along a few learned directions.

A layer that makes y of x makes y + Q diag(l) Qᵀ (y - x) of it, with Q [width, rank] of orthonormal columns and l
[rank] by the class of the token: exp(s) - 1 for class +1, exp(-s) - 1 for -1, which undoes the other, and 0 for
class 0, where the adapter is off. s [rank] starts at 0, so that nothing is changed before the first step. After each
step Q -= gamma x Q (QᵀQ - I), Newton's step towards orthonormal columns where gamma is 0.5.

The classes of a micro-batch are told before its forward pass. A layer is given them by its call and not from an
attribute, so that activation checkpointing, attached later, repeats a layer with the classes that it had.

Guarantees: any number of stages starts alike and computes the same. Cost: rank x (width + 1) numbers a layer, and two
products of [tokens, width] with [width, rank].
"""

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from jllm.errors import UserError
from jllm.models.pipeline.bundle import CONTROL_CLASS
from jllm.models.pipeline.stand_ins import AbsentLayer
from jllm.models.weights.initial import derived_seed

DIRECTIONS, STRENGTHS = "control_Q", "control_S"
"""The names of Q and s in a decoder layer."""
CLASSES = (-1, 0, 1)
_ARGUMENT = "control_class"


class ControlClasses:
    """The classes of the micro-batch whose forward pass begins; `tell` is for the stage to call."""

    def __init__(self) -> None:
        self._now: Tensor | None = None

    def tell(self, planes: Mapping[str, Tensor]) -> None:
        """Take the plane [B, S] of classes among those of a micro-batch."""
        self._now = planes[CONTROL_CLASS]

    def now(self) -> Tensor:
        """What was told last."""
        assert self._now is not None, "no classes were told"
        return self._now


def attach_control(
    model: PreTrainedModel,
    *,
    rank: int,
    prefix: str,
    layers: Collection[int],
    width: int,
    seed: int,
    dtype: torch.dtype,
) -> ControlClasses:
    """Give the decoder layers that a stage has their control adapters; what is there already is frozen.

    Args:
        model: loaded and sealed, without activation checkpointing.
        rank: columns of Q.
        prefix: the dotted name of the model's decoder layers.
        layers: numbers of those that get one.
        width: of the hidden states.
        seed: of Q.
        dtype: of Q and s.

    Returns:
        What has to be told the classes of every micro-batch.
    """
    classes = ControlClasses()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(False)
    for number in sorted(layers):
        layer = model.get_submodule(f"{prefix}.{number}")
        if isinstance(layer, AbsentLayer):
            continue
        device = next(layer.parameters()).device
        directions = torch.empty(width, rank, dtype=dtype, device=device)
        if device.type != "meta":
            generator = torch.Generator().manual_seed(derived_seed(seed, f"{prefix}.{number}.{DIRECTIONS}"))
            drawn = torch.empty(width, rank).normal_(generator=generator)
            directions.copy_(torch.linalg.qr(drawn).Q)
        layer.register_parameter(DIRECTIONS, nn.Parameter(directions))
        layer.register_parameter(STRENGTHS, nn.Parameter(torch.zeros(rank, dtype=dtype, device=device)))
        # A function of the layer, which is compiled once for all of them (`jllm.models.compiled`).
        layer.forward = functools.partial(_controlled, layer, type(layer).forward)
        layer.register_forward_pre_hook(functools.partial(_with_classes, classes), with_kwargs=True)
    return classes


def _with_classes(
    classes: ControlClasses, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {**kwargs, _ARGUMENT: classes.now()}


def _controlled(layer: nn.Module, forward: Callable[..., Any], *args: Any, control_class: Tensor, **kwargs: Any) -> Any:
    """The layer's output with its adapter; `forward` is that of the layer's class."""
    before = args[0] if args else kwargs["hidden_states"]
    if before.shape[:-1] != control_class.shape:
        raise UserError(
            f"--control_adapter_rank: the decoder layers of this model are given hidden states {list(before.shape)}"
            " and not one for each token; train LoRA adapters instead: --lora_dim"
        )
    output = forward(layer, *args, **kwargs)
    after = output[0] if isinstance(output, (tuple, list)) else output
    changed = after + change(
        after - before,
        getattr(layer, DIRECTIONS),
        getattr(layer, STRENGTHS),
        control_class.to(after.device),
    ).to(after.dtype)
    return type(output)([changed, *output[1:]]) if isinstance(output, (tuple, list)) else changed


def change(added: Tensor, directions: Tensor, strengths: Tensor, classes: Tensor) -> Tensor:
    """Q diag(l) Qᵀ of what a layer added.

    Args:
        added: [B, S, width].
        directions: Q, [width, rank].
        strengths: s, [rank].
        classes: [B, S] of -1, 0 and 1.

    Returns:
        [B, S, width], of Q's type.
    """
    along = added.to(directions.dtype) @ directions
    # exp(0) - 1 is 0: class 0 needs no case of its own.
    return (along * torch.expm1(classes[..., None].to(strengths.dtype) * strengths)) @ directions.mT


class ControlAdapters:
    """The control adapters of a stage, changed in place.

    Args:
        model: with adapters attached, or with none on this stage.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(getattr(module, STRENGTHS, None), Tensor)
        }

    @property
    def names(self) -> list[str]:
        """Of the layers, in the order of everything that is returned for them."""
        return list(self._layers)

    @torch.no_grad()
    def strengths(self) -> Tensor:
        """[n] the largest |l| of class +1 of each layer: with orthonormal columns, the spectral norm of the change."""
        return _stacked([torch.expm1(getattr(layer, STRENGTHS)).abs().max() for layer in self._layers.values()])

    @torch.no_grad()
    def skews(self) -> Tensor:
        """[n] |QᵀQ - I|² of each layer: 0 where its directions are orthonormal."""
        return _stacked([_skew(getattr(layer, DIRECTIONS)).square().sum() for layer in self._layers.values()])

    @torch.no_grad()
    def straighten(self, gamma: float) -> None:
        """Q -= gamma x Q (QᵀQ - I), in fp32."""
        for layer in self._layers.values():
            directions = getattr(layer, DIRECTIONS)
            directions.sub_((directions.float() @ _skew(directions)).mul_(gamma).to(directions.dtype))

    @torch.no_grad()
    def decay(self, weight: float, rate_of: Callable[[nn.Parameter], float]) -> None:
        """s -= rate x weight x s, which draws 1 + l to 1 for both classes alike.

        Args:
            weight: of the decay.
            rate_of: the learning rate of a parameter.
        """
        for layer in self._layers.values():
            strengths = getattr(layer, STRENGTHS)
            strengths.mul_(1 - rate_of(strengths) * weight)


def _skew(directions: Tensor) -> Tensor:
    """QᵀQ - I, [rank, rank] fp32."""
    square = directions.float().mT @ directions.float()
    square.diagonal().sub_(1)
    return square


def _stacked(values: list[Tensor]) -> Tensor:
    return torch.stack(values) if values else torch.empty(0)
