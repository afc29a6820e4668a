"""Trading time for memory: recompute activations in the backward pass, or keep them in host memory.

    interval k         groups of k decoder layers keep only their input, and run again in the backward pass
    attention_only     every layer's attention runs again, the rest keeps its activations: most of the memory of long
                       sequences for a small part of the time (k is then not used)
    offload            the inputs that these keep go to host memory, and come back when they are needed

Losses and gradients are those without it: the same operations run twice, with the same random state.

The families' own loop over the layers is not touched. In a group, every layer but the last only notes how it was
called; the last one runs them all. So masks and rotary tables stay each layer's own. What such a layer returns beside
the hidden state is a `Later`: the loop may index it, unpack it and give it to the next layers, which then get what it
stands for.

Costs: interval k keeps layers / k inputs and recomputes k layers at a time, about a third more time; offload copies
each kept tensor over the bus twice, beside the computation where memory can be pinned.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from jllm.errors import UserError
from jllm.models.pipeline.carving import structure_of
from jllm.models.pipeline.span import StageSpan
from jllm.models.pipeline.trial import is_trial

Forward = Callable[..., Any]


@dataclass
class Checkpointing:
    """A stage's activation checkpointing: a switch, and counts for tests and logs."""

    units: int = 0
    """Groups of layers, or attentions, that are recomputed."""
    is_enabled: bool = True
    """Turn off to stop recomputing from the next step on (`--no_checkpoint_grad_step`)."""
    offload: bool = False
    recomputed: int = 0
    """How often a unit ran again since the start."""
    offloaded_bytes: int = 0
    """Bytes sent to host memory since the start."""

    @property
    def is_active(self) -> bool:
        """Whether a forward pass now should be checkpointed."""
        return self.is_enabled and torch.is_grad_enabled() and not is_trial()

    def run(self, function: Forward, *args: Any, **kwargs: Any) -> Any:
        """Run `function`, keeping only its inputs, and run it again in the backward pass.

        With `offload`, tensors among `args` are kept in host memory; those among `kwargs` stay where they are.
        """
        calls = 0

        def counted(*inner: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            self.recomputed += calls > 1
            return function(*inner, **named)

        if not self.offload:
            return checkpoint(counted, *args, use_reentrant=False, **kwargs)
        with torch.autograd.graph.saved_tensors_hooks(self._to_host, _from_host):
            return checkpoint(counted, *args, use_reentrant=False, **kwargs)

    def _to_host(self, tensor: Tensor) -> tuple[torch.device, Tensor]:
        self.offloaded_bytes += tensor.numel() * tensor.element_size()
        on_device = tensor.device.type != "cpu"
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_device)
        host.copy_(tensor, non_blocking=on_device)
        return tensor.device, host


def _from_host(packed: tuple[torch.device, Tensor]) -> Tensor:
    device, host = packed
    return host.to(device, non_blocking=True)


def checkpoint_activations(
    model: PreTrainedModel,
    span: StageSpan,
    *,
    interval: int = 1,
    attention_only: bool = False,
    offload: bool = False,
    is_compiled: bool = False,
) -> Checkpointing:
    """Switch it on for this stage's layers. Call once, after compiling layers (if they are) and before training.

    Args:
        model: loaded and sealed.
        span: of the stage.
        interval: as above.
        attention_only: as above.
        offload: as above.
        is_compiled: whether the layers were compiled, and with `attention_only` their attention too.

    Raises:
        UserError: there are no layers, or with `attention_only` no attentions in the whole model, or the interval is
            below 1.
    """
    structure = structure_of(model)
    state = Checkpointing(offload=offload)
    if not structure.layers:
        raise UserError(
            f"model type {model.config.model_type!r} has no single list of decoder layers to checkpoint; "
            "leave activation checkpointing off"
        )
    layers = [model.get_submodule(f"{structure.layers}.{index}") for index in range(span.first_layer, span.end_layer)]
    if attention_only:
        for layer in layers:
            for attention in find_attention(layer):
                _recompute_alone(attention, state, is_compiled=is_compiled)
                state.units += 1
        # Hybrids have stages without attention, which then have nothing to recompute.
        if not state.units and not _has_attention(model):
            raise UserError(
                f"model type {model.config.model_type!r} has no attention module to recompute; "
                "give an interval of layers instead"
            )
        return state
    if interval < 1:
        raise UserError(f"activation checkpointing every {interval} layers: the interval is at least 1 (0: off)")
    for start in range(0, len(layers), interval):
        _group(layers[start : start + interval], state, structure.returned)
        state.units += 1
    return state


def find_attention(layer: nn.Module) -> list[nn.Module]:
    """The outermost modules of a decoder layer that are attentions, by class name."""
    found: list[nn.Module] = []
    for child in layer.children():
        name = type(child).__name__
        found += [child] if "Attention" in name or name.endswith("MLA") else find_attention(child)
    return found


def _has_attention(model: PreTrainedModel) -> bool:
    """Whether any stage of the whole model has attention: the same answer on all of them."""
    family: Any = type(model).__base__  # a stage's class is derived from the family's own
    with torch.device("meta"):
        whole = family._from_config(copy.deepcopy(model.config))
    return bool(find_attention(whole.get_submodule(structure_of(model).layers)))


class Later:
    """Stands for what a layer that has not run yet will return beside the hidden state."""


@dataclass
class _Call:
    """How a layer was called: all but its hidden state."""

    forward: Forward
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    returned: tuple[Later, ...] = ()
    """What was returned for it, beside the hidden state."""


@dataclass
class _LayerGroup:
    """Calls that wait for the last layer of their group."""

    calls: list[_Call] = field(default_factory=list)
    entered: Tensor | None = None
    """The hidden state that the first of them was given."""


def _group(layers: list[nn.Module], state: Checkpointing, returned: int) -> None:
    group = _LayerGroup()
    for layer in layers:
        layer.forward = _grouped(layer.forward, group, state, returned, is_last=layer is layers[-1])


def _grouped(forward: Forward, group: _LayerGroup, state: Checkpointing, returned: int, *, is_last: bool) -> Forward:
    def grouped(*args: Any, **kwargs: Any) -> Any:
        if not state.is_active:
            return forward(*args, **kwargs)
        hidden = args[0] if args else kwargs.pop("hidden_states")
        if not group.calls:
            group.entered = hidden
        assert hidden is group.entered, "the family's loop changes the hidden state between layers; use interval 1"
        call = _Call(forward, args[1:], kwargs)
        group.calls.append(call)
        if not is_last:
            call.returned = tuple(Later() for _ in range(returned - 1))
            return (hidden, *call.returned) if returned else hidden
        calls, group.calls, group.entered = group.calls, [], None
        return state.run(lambda hidden: _run(calls, hidden), hidden)

    return grouped


def _run(calls: list[_Call], hidden: Tensor) -> Any:
    """The layers of a group, one after the other; what the last one returns."""
    output: Any = hidden
    known: dict[Later, Any] = {}

    def real(value: Any) -> Any:
        return known[value] if isinstance(value, Later) else value

    for call in calls:
        named = {name: real(value) for name, value in call.kwargs.items()}
        output = call.forward(hidden, *map(real, call.args), **named)
        hidden, *others = output if isinstance(output, (tuple, list)) else (output,)
        known |= zip(call.returned, others, strict=False)
    return output


def _recompute_alone(module: nn.Module, state: Checkpointing, *, is_compiled: bool) -> None:
    forward = module.forward

    def alone(*args: Any, **kwargs: Any) -> Any:
        if not state.is_active:
            return forward(*args, **kwargs)
        if args:
            return state.run(forward, *args, **kwargs)
        # Only what is given by position can be offloaded, and decoder layers name all they give to their attention.
        hidden = kwargs.pop("hidden_states")
        return state.run(lambda hidden: forward(hidden_states=hidden, **kwargs), hidden)

    # What is compiled of the layer ends before, and goes on after it.
    module.forward = torch.compiler.disable(alone) if is_compiled else alone
