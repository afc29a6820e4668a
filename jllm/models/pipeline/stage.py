"""One pipeline stage: the transformers model itself, with what the stage does not own left out.

What a later stage receives enters at the first decoder layer, not as `inputs_embeds`, and what is sent leaves after
the stage's last layer (or half of one): whatever the family does around its layers (scaling the embedding, learned
positions, expanding and collapsing residual streams, norms) happens on the first or the last stage only, and needs no
code here. So do scaling and soft-capping of logits: the last stage runs the family's head on what the objective asks
for, or, where that is not shown to be the same, the family's whole forward.

Guarantees: chained stages compute what the whole model computes, the same operations in the same order.
Costs: masks and rotary tables are computed once per stage; the element-wise operations around the layers run on every
stage, on tensors that are then dropped (no gradient).

Masks follow the position ids: where they restart inside a row, documents do not attend to each other; where they do
not, attention is plainly causal. Padding belongs at the end of rows, masked in the labels, and needs no mask.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from jllm.models.attention import DocumentBounds, packing
from jllm.models.families import has_head_apart
from jllm.models.pipeline.bundle import INPUT_IDS, POSITION_IDS, READ, Bundle, Planes
from jllm.models.pipeline.carving import entrance_of, exit_of, published_names, structure_of
from jllm.models.pipeline.head import FamilyHead, Head, LogitsGiven
from jllm.models.pipeline.plain_head import find_plain_head
from jllm.models.pipeline.span import StageSpan
from jllm.models.sequence_parallel.share import SequenceShare

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
        is_frozen: whether the model itself stays as it was loaded, on all stages; what is attached to it may train.
        tell: called with the planes of a micro-batch before its forward pass, for what is attached to layers.
        are_rows_whole: whether positions never restart inside a row.
        share: this process's run of each row, where several share them: hidden states are those of the run, planes
            travel whole.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        span: StageSpan,
        objective: Objective,
        *,
        head_apart: bool | None = None,
        read: tuple[str, ...] = READ,
        is_frozen: bool = False,
        tell: Callable[[Mapping[str, Tensor]], None] | None = None,
        are_rows_whole: bool = False,
        share: SequenceShare | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.span = span
        self.objective = objective
        self.is_frozen = is_frozen
        self._tell, self._are_rows_whole, self._share = tell, are_rows_whole, share
        self.documents: DocumentBounds | None = None
        """What is known of the micro-batches to come, where rows are not whole."""
        if head_apart is None:
            head_apart = has_head_apart(type(model))
        self._runs_whole = span.is_last and not head_apart
        self._structure = structure_of(model)
        # The model without its head: what holds the decoder layers, one level below.
        self._base_name, *inside = self._structure.layers.split(".")
        self._inner_names = tuple(inside[:-1])
        self.plain_head = None
        """What the logits are, on a last stage where they are a product of what the head is given."""
        if span.is_last and head_apart:
            self.plain_head = find_plain_head(model, base_name=self._base_name, inner_names=self._inner_names)
        # Families without positions of their own (ALiBi, recurrent ones) do not take position ids.
        self._takes = accepted_arguments(self._runner, model.get_submodule(self._base_name))
        needs_ids = self._structure.needs_ids and span.count > 1 and INPUT_IDS not in read
        self._adds_ids = needs_ids and span.is_first
        self.receives = (*read, INPUT_IDS) if needs_ids and not span.is_first else read
        """The names of the planes that this stage is given."""
        # The configuration may ask for a balance loss, which a stage cannot compute; see `jllm.models.router_balance`.
        asked = getattr(model.config, "output_router_logits", False)
        self._unwanted = {"output_router_logits": False} if asked else {}

    def forward(self, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor] | Tensor:
        """What a bundle is sent as (on the first stage with input ids for hidden states) → the same, or the loss."""
        bundle = Bundle.received(inputs, self.receives)
        own = bundle.planes if self._share is None else self._share.own_planes(bundle.planes)
        if self._tell is not None:
            self._tell(own)
        positions = own[POSITION_IDS]
        arguments: dict[str, Any] = {
            name: value for name, value in (("position_ids", positions), ("use_cache", False)) if name in self._takes
        }
        known: dict[str, Any] = {"are_rows_whole": self._are_rows_whole, "documents": self.documents}
        if self._share is None:
            arguments |= packing(self.model, positions, **known) | self._unwanted
        else:
            arguments |= self._share.arguments(bundle.planes[POSITION_IDS]) | self._unwanted
        if self.span.is_first:
            ids, planes = bundle.hidden, bundle.planes
            if self._adds_ids:
                planes = planes.with_plane(INPUT_IDS, ids)
            ids = ids if self._share is None else self._share.own(ids)
            return self._sent(self._runner(input_ids=ids, **arguments), planes, own)
        entrance = entrance_of(self.model)
        entrance.received = bundle.hidden
        # The embedding is absent here: any ids give zeros of the right shape, which the entrance then ignores.
        ids = own[INPUT_IDS] if INPUT_IDS in self.receives else positions
        try:
            return self._sent(self._runner(input_ids=ids, **arguments), bundle.planes, own)
        finally:
            entrance.received = None

    def stored_parameters(self) -> dict[str, nn.Parameter]:
        """What a checkpoint holds of this stage, by names of the whole model; of a frozen one what trains beside it."""
        names = published_names(self.model, self.span)
        return {
            names[name]: parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad or not self.is_frozen
        }

    def _sent(self, output: Any, planes: Planes, own: Planes) -> tuple[Tensor, Tensor] | Tensor:
        """What this stage hands on, given what the family's forward returned; `own` planes are of its run of tokens."""
        if self.span.is_last:
            return self._computed(output, own)
        leave = exit_of(self.model)
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
            self.model,
            base_name=self._base_name,
            inner_names=self._inner_names,
            returned=type(output),
            plain=self.plain_head,
        )
        return self.objective(output.last_hidden_state, head, fields)


def accepted_arguments(model: nn.Module, base: nn.Module) -> frozenset[str]:
    """What the forward of `model` takes by name; where it passes on what it does not name, that of `base` too."""
    own = inspect.signature(type(model).forward).parameters
    passes_on = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in own.values())
    return frozenset(own) | (frozenset(inspect.signature(type(base).forward).parameters) if passes_on else frozenset())
