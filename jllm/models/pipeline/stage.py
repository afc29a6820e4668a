"""One pipeline stage: the transformers model itself, with what the stage does not own left out.

A stage keeps the family's own `ForCausalLM` class. Decoder layers of other stages are replaced by stand-ins that hand
the hidden state on, so layer indices, attention masks, rotary tables and sliding windows stay the family's own, and
parameter names stay global: `model.layers.7.mlp.up_proj.weight` has that name whatever the number of stages.

What a later stage receives enters at the first decoder layer, not as `inputs_embeds`, and what is sent leaves after
the stage's last layer: whatever the family does around its layers (scaling the embedding, learned positions, expanding
and collapsing residual streams, norms) happens on the first or the last stage only, and needs no code here. So do
scaling and soft-capping of logits: the last stage runs the family's head on what the objective asks for, or, where that
is not shown to be the same, the family's whole forward.

Guarantees: chained stages compute what the whole model computes, the same operations in the same order.
Costs: masks and rotary tables are computed once per stage; the element-wise operations around the layers run on every
stage, on tensors that are then dropped (no gradient).

Masks follow the position ids: where they restart inside a row, documents do not attend to each other; where they do
not, attention is plainly causal. Padding belongs at the end of rows, masked in the labels, and needs no mask.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from jllm.models.attention import packing
from jllm.models.families import check_split, has_head_apart
from jllm.models.pipeline.bundle import INPUT_IDS, POSITION_IDS, READ, Bundle, Planes
from jllm.models.pipeline.head import FamilyHead, Head, LogitsGiven
from jllm.models.pipeline.structure import Anatomy, find_anatomy, whole_anatomy


@dataclass(frozen=True, kw_only=True)
class StageSpan:
    """What one pipeline stage owns: decoder layers [first_layer, end_layer), and what lies before or after them all."""

    index: int
    count: int
    first_layer: int
    end_layer: int

    @property
    def is_first(self) -> bool:
        """Whether this stage owns the embedding."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether this stage owns the final norm and the head."""
        return self.index == self.count - 1

    @property
    def num_layers(self) -> int:
        """How many decoder layers this stage owns."""
        return self.end_layer - self.first_layer


def spans_of(boundaries: Sequence[int]) -> list[StageSpan]:
    """The stages between `boundaries`: [0, 8, 17, 26] gives three."""
    count = len(boundaries) - 1
    return [
        StageSpan(index=index, count=count, first_layer=boundaries[index], end_layer=boundaries[index + 1])
        for index in range(count)
    ]


class AbsentLayer(nn.Module):
    """Stands in for a decoder layer of another stage: hands the hidden state on.

    It answers for the plain attributes of the layer it replaces (`attention_type`, ...), which some families read
    while they walk the list. On a later stage layer 0 is the entrance: it returns what was received. On all stages but
    the last one, the stand-in after the stage's own layers is the exit: it keeps what is to be sent.
    """

    def __init__(self, replaced: nn.Module, returned: int) -> None:
        super().__init__()
        own = set(nn.Module().__dict__)
        for name, value in replaced.__dict__.items():
            if name not in own and isinstance(value, (int, float, str, bool)):
                setattr(self, name, value)
        self.__dict__["_replaced"] = type(replaced)
        self.returned = returned
        self.is_exit = False
        self.received: Tensor | None = None
        self.sent: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        """The class attributes of the replaced layer; its methods (to set a mode, ...) do nothing here."""
        value = getattr(self.__dict__.get("_replaced"), name, None)
        if value is None or isinstance(value, property):
            return super().__getattr__(name)
        return _do_nothing if callable(value) else value

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The received hidden state on an entrance, else the first argument."""
        hidden = self.received if self.received is not None else args[0] if args else kwargs["hidden_states"]
        if self.is_exit:
            self.sent = hidden
        return (hidden, *[None] * (self.returned - 1)) if self.returned else hidden


class AbsentEmbedding(nn.Module):
    """Stands in for an embedding (of tokens or positions) of the first stage: adds nothing."""

    weight: Tensor

    def __init__(self, replaced: nn.Embedding) -> None:
        super().__init__()
        self.width = replaced.embedding_dim
        # Without elements: some families look at it for the device.
        empty = torch.empty(0, dtype=replaced.weight.dtype, device=replaced.weight.device)
        self.register_buffer("weight", empty, persistent=False)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Zeros in the shape of an embedding of the first tensor argument."""
        ids = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        return torch.zeros(*ids.shape, self.width, dtype=self.weight.dtype, device=ids.device)


class AbsentModule(nn.Module):
    """Stands in for a norm, a projection or a head of another stage: hands its input on, in the right shape."""

    def __init__(self, replaced: nn.Module) -> None:
        super().__init__()
        self.width: int | None = None
        if isinstance(replaced, nn.Linear) and replaced.in_features != replaced.out_features:
            self.width = replaced.out_features

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Its input, or zeros of the width that the replaced projection would give."""
        return hidden if self.width is None else hidden.new_zeros(1).expand(*hidden.shape[:-1], self.width)


def stage_class(family: type[PreTrainedModel], span: StageSpan) -> type[PreTrainedModel]:
    """The family's own class, whose instances keep only what `span` owns.

    Deriving at run time lets `from_pretrained` build the whole model without memory (meta device), lose the parts of
    other stages, and then read only the tensors that still have a place.
    """

    def init(self: PreTrainedModel, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        family.__init__(self, config, *args, **kwargs)
        carve(self, span)

    namespace = {
        "__init__": init,
        "__module__": family.__module__,
        "__qualname__": family.__qualname__,
        "__doc__": family.__doc__,
    }
    return type(family.__name__, (family,), namespace)


def carve(model: PreTrainedModel, span: StageSpan) -> None:
    """Replace in place what `span` does not own. A tied head and its embedding stay together until `seal`.

    Raises:
        UserError: the model cannot be cut this way, and why.
    """
    check_split(model.config, span)
    anatomy = find_anatomy(model) if span.count > 1 else whole_anatomy(model)
    model.__dict__["_jllm_anatomy"] = anatomy
    if span.count == 1:
        return
    # transformers ties whichever of the two is stored to the other, and sees where both are and differ.
    pairs = anatomy.tied if span.is_first or span.is_last else ()
    together = [name for pair in pairs for name in pair]
    layers = model.get_submodule(anatomy.layers)
    assert isinstance(layers, nn.ModuleList)
    assert 0 <= span.first_layer < span.end_layer <= anatomy.num_layers
    for index, layer in enumerate(layers):
        if not span.first_layer <= index < span.end_layer:
            layers[index] = AbsentLayer(layer, anatomy.returned)
    for name in (*(() if span.is_first else anatomy.before), *(() if span.is_last else anatomy.after)):
        if not any(one.startswith(name + ".") for one in together):
            _replace(model, name)
    if not span.is_last:
        leave = layers[span.end_layer]
        assert isinstance(leave, AbsentLayer)
        leave.is_exit = True
        # What a family initialises from the top is the head, which is elsewhere.
        model._is_hf_initialized = True
    if not together:
        model.all_tied_weights_keys = {}


def seal(model: PreTrainedModel, span: StageSpan) -> None:
    """After the weights are in: of a tied pair the first stage keeps the embedding and the last one the head."""
    if span.is_first == span.is_last:
        return
    anatomy = anatomy_of(model)
    for name in anatomy.after if span.is_first else anatomy.before:
        if any(True for _ in model.get_submodule(name).parameters()):
            _replace(model, name)
    # Not a tie inside this process any more: the other one is on another stage.
    model.all_tied_weights_keys = {}


def anatomy_of(model: PreTrainedModel) -> Anatomy:
    """The parts of a model that went through `carve`, as they were in the whole model."""
    anatomy = model._jllm_anatomy
    assert isinstance(anatomy, Anatomy)
    return anatomy


def published_names(model: PreTrainedModel, span: StageSpan) -> dict[str, str]:
    """Name of each parameter in this stage's model → its name in the whole model.

    The two differ only for a tied head on a stage that does not own the embedding: there the head's own name maps to
    the embedding's, because in the whole model they are one tensor. So two stages share that name, and nothing else.
    """
    copies = dict(anatomy_of(model).tied) if span.is_last else {}
    return {name: copies.get(name, name) for name, _ in model.named_parameters()}


def tied_parameter(model: PreTrainedModel, span: StageSpan) -> tuple[str, nn.Parameter] | None:
    """The parameter that must be kept equal on the first and the last stage, with its name in the whole model.

    The embedding on the first stage, the head's copy on the last one; None on other stages, for an untied model, and
    with one stage. The sum of both gradients is the whole model's gradient.
    """
    ties = anatomy_of(model).tied
    if not ties or span.count == 1 or not (span.is_first or span.is_last):
        return None
    assert len(ties) == 1, ties
    copy, original = ties[0]
    return original, model.get_parameter(original if span.is_first else copy)


Objective = Callable[[Tensor, Head, Mapping[str, Tensor]], Tensor]
"""(final hidden states, head, named fields of the micro-batch) → a scalar to be differentiated."""


class PipelineStage(nn.Module):
    """The single DeepSpeed layer of a pipeline rank.

    Between stages travels a bundle (`jllm.models.pipeline.bundle`) as a tuple of two tensors. The first stage takes
    (input ids [B, S], the planes of the reader); the last stage returns what `objective` makes of the final hidden
    states, the head, and the planes by name. Where layers look at the input ids, the first stage adds these as a plane.

    Args:
        model: loaded and sealed.
        span: what of the whole model it is.
        objective: called on the last stage.
        head_apart: whether the head runs apart from the rest; None: where the walk over all families has shown that it
            works. Elsewhere the whole forward runs and the objective is given logits.
        read: the names of the planes that the first stage is given.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        span: StageSpan,
        objective: Objective,
        *,
        head_apart: bool | None = None,
        read: tuple[str, ...] = READ,
    ) -> None:
        super().__init__()
        self.model = model
        self.span = span
        self.objective = objective
        if head_apart is None:
            head_apart = has_head_apart(type(model))
        self._runs_whole = span.is_last and not head_apart
        self._anatomy = anatomy_of(model)
        # The model without its head: what holds the decoder layers, one level below.
        self._base_name, *self._inside_base = self._anatomy.layers.split(".")
        # Families without positions of their own (ALiBi, recurrent ones) do not take position ids.
        self._takes = accepted_arguments(self._runner, model.get_submodule(self._base_name))
        needs_ids = self._anatomy.needs_ids and span.count > 1 and INPUT_IDS not in read
        self._adds_ids = needs_ids and span.is_first
        self.receives = (*read, INPUT_IDS) if needs_ids and not span.is_first else read
        """The names of the planes that this stage is given."""
        # The configuration may ask for a balance loss, which a stage cannot compute; see `jllm.models.router_balance`.
        asked = getattr(model.config, "output_router_logits", False)
        self._unwanted = {"output_router_logits": False} if asked else {}

    def forward(self, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor] | Tensor:
        """What a bundle is sent as (on the first stage with input ids for hidden states) → the same, or the loss."""
        bundle = Bundle.received(inputs, self.receives)
        positions = bundle.planes[POSITION_IDS]
        arguments: dict[str, Any] = {
            name: value for name, value in (("position_ids", positions), ("use_cache", False)) if name in self._takes
        }
        arguments |= packing(self.model, positions) | self._unwanted
        if self.span.is_first:
            ids, planes = bundle.hidden, bundle.planes
            if self._adds_ids:
                planes = planes.with_plane(INPUT_IDS, ids)
            return self._sent(self._runner(input_ids=ids, **arguments), planes)
        entrance = self._layer(0)
        entrance.received = bundle.hidden
        # The embedding is absent here: any ids give zeros of the right shape, which the entrance then ignores.
        ids = bundle.planes[INPUT_IDS] if INPUT_IDS in self.receives else positions
        try:
            return self._sent(self._runner(input_ids=ids, **arguments), bundle.planes)
        finally:
            entrance.received = None

    def _sent(self, output: Any, planes: Planes) -> tuple[Tensor, Tensor] | Tensor:
        """What this stage hands on, given what the family's forward returned."""
        if self.span.is_last:
            return self._computed(output, planes)
        leave = self._layer(self.span.end_layer)
        hidden, leave.sent = leave.sent, None
        assert hidden is not None, "the family's forward did not walk its list of layers"
        if self.training and torch.is_grad_enabled() and not hidden.requires_grad:
            # Nothing up to here trains; the pipeline still expects to send a gradient for it.
            hidden = hidden.detach().requires_grad_()
        return Bundle(hidden, planes).sent

    @property
    def _runner(self) -> nn.Module:
        """What of the model runs: all of it, or its base."""
        return self.model if self._runs_whole else self.model.get_submodule(self._base_name)

    def _computed(self, output: Any, fields: Mapping[str, Tensor]) -> Tensor:
        """What the objective makes of what the family's forward returned."""
        if self._runs_whole:
            return self.objective(output.logits, LogitsGiven(output.logits.shape[-1]), fields)
        head = FamilyHead(
            self.model, base_name=self._base_name, inner_names=tuple(self._inside_base[:-1]), returned=type(output)
        )
        return self.objective(output.last_hidden_state, head, fields)

    def _layer(self, index: int) -> AbsentLayer:
        layer = self.model.get_submodule(f"{self._anatomy.layers}.{index}")
        assert isinstance(layer, AbsentLayer)
        return layer


def accepted_arguments(model: nn.Module, base: nn.Module) -> frozenset[str]:
    """What the forward of `model` takes by name; where it passes on what it does not name, that of `base` too."""
    own = inspect.signature(type(model).forward).parameters
    passes_on = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in own.values())
    return frozenset(own) | (frozenset(inspect.signature(type(base).forward).parameters) if passes_on else frozenset())


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    """A method of a layer that is elsewhere."""


def _replace(model: PreTrainedModel, name: str) -> None:
    """Put the fitting stand-in where module `name` is."""
    parent_name, _, child_name = name.rpartition(".")
    replaced = model.get_submodule(name)
    embedding = next((module for module in replaced.modules() if isinstance(module, nn.Embedding)), None)
    stand_in = AbsentModule(replaced) if embedding is None else AbsentEmbedding(embedding)
    setattr(model.get_submodule(parent_name), child_name, stand_in)
