"""What each decoder layer or half of one, the embedding and the head cost: compute, parameters, bytes of activations.

The one cost model behind every partition method and the stage table. Parameters are counted on the family's own model
built without memory (meta device), so they are exact. Time is estimated from them: two operations per weight, token
and matrix product in the forward pass, twice that in the backward pass, attention scores added, experts counted as
often as they are used; `measured` replaces the estimates by timings. Activations: what each product needs for its
backward pass. Estimates rank layers well and stages within some percent; they do not predict seconds.

Costs: building the model on the meta device, some milliseconds per layer.
"""

import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from jllm.models.families import has_head_apart, has_plain_head
from jllm.models.pipeline.counted import CountedModel
from jllm.models.pipeline.halves import as_modules
from jllm.models.pipeline.head import tokens_of_a_chunk
from jllm.models.pipeline.layer_costs import (
    Parts,
    activation_bytes_per_token,
    attention_operations,
    in_one_part,
    parts_of_attention,
    unpacked,
    weights_used,
)
from jllm.models.trainable import ParameterChoice, matching

# Forward and backward pass in units of the forward pass, and with the forward pass repeated.
_TRAINING, _RECOMPUTED = 3.0, 4.0


@dataclass(frozen=True, kw_only=True)
class StateBytes:
    """Bytes of one parameter on its device, with all that training keeps for it."""

    trained: float
    frozen: float
    quantised: float = 0.0
    """Of one that is frozen in few bits, with its share of the scales."""


def state_bytes(
    dtype: torch.dtype,
    *,
    moments: float = 2,
    sharded_over: int | None = None,
    has_masters: bool = True,
    on_host: bool = False,
) -> StateBytes:
    """Weight, gradient and optimizer state of a parameter, as DeepSpeed's optimizers keep them.

    bf16: weight 2, sum of gradients 4, and over the data-parallel ranks master weight 4 and 4 a moment.
    fp16: no sum of gradients, but an fp32 copy of the rank's own share of the gradient. fp32: weight, gradient and
    moments; a master weight only where they are shared.

    Args:
        dtype: of the weights.
        moments: numbers that the optimizer keeps per parameter: 2 for AdamW; fp32 where there are masters.
        has_masters: whether weights of 2 bytes have fp32 masters.
        on_host: masters and moments are in host memory.
        sharded_over: data-parallel ranks that share the optimizer's state (ZeRO 1); None where each keeps it all.
    """
    size = float(dtype.itemsize)
    if not has_masters:
        return StateBytes(trained=size * (2 + moments), frozen=size)
    gradient = 4.0 if dtype == torch.bfloat16 else size
    shared = 4.0 * moments
    if dtype != torch.float32 or sharded_over is not None:
        shared += 4.0
    if dtype == torch.float16:
        shared += 4.0
    if on_host:
        shared = 0.0
    return StateBytes(trained=size + gradient + shared / (sharded_over or 1), frozen=size)


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """How many parameters, how many of them train, and how many of the others are quantised."""

    total: int
    trained: int
    quantised: int = 0

    def __add__(self, other: "Parameters") -> "Parameters":
        return Parameters(
            total=self.total + other.total,
            trained=self.trained + other.trained,
            quantised=self.quantised + other.quantised,
        )

    def __sub__(self, other: "Parameters") -> "Parameters":
        return Parameters(
            total=self.total - other.total,
            trained=self.trained - other.trained,
            quantised=self.quantised - other.quantised,
        )


NO_PARAMETERS = Parameters(total=0, trained=0)


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """Costs of one decoder layer, or of half of one, for one micro-batch."""

    kind: str
    """Class name of the layer, and the layer's type where the configuration gives one; `type:regex` matches on it."""
    parameters: Parameters
    time: float
    """Forward and backward pass, in operations or (when measured) in seconds."""
    activation_bytes: float
    """Kept from the forward to the backward pass."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Costs of a model for one micro-batch, split the way stages can split it.

    Stages are given as decoder layers [first, end); the embedding counts where first is 0, final norm and head where
    end is the number of layers. With `in_halves` all these count half layers.
    """

    layers: tuple[LayerCost, ...]
    in_halves: bool = False
    """Whether stages may be cut inside layers: then `layers` are half layers, two of each."""
    embedding_parameters: Parameters
    head_parameters: Parameters
    """Final norm and head; a tied head counts, because a last stage holds a copy."""
    embedding_time: float
    head_time: float
    embedding_activation_bytes: float
    head_activation_bytes: float
    """Logits and their gradient: held for one micro-batch, or one chunk of it, at a time, by the last stage only."""
    boundary_bytes: float
    """The hidden state that a stage receives and keeps per micro-batch in flight."""
    transient_bytes: float
    """Activations that exist only while checkpointed layers are recomputed."""
    state: StateBytes
    operations: float
    """Of a forward and a backward pass of the whole model, none of them repeated."""
    tied_parameters: Parameters
    """Of the embedding and of the head: one stage that has both holds them once."""
    model_parameters: Parameters
    """Of the whole model, however many processes share it."""
    is_measured: bool = False

    def of_layers(self) -> "Costs":
        """The same of whole layers."""
        if not self.in_halves:
            return self
        layers = tuple(
            LayerCost(
                kind=first.kind,
                parameters=first.parameters + second.parameters,
                time=first.time + second.time,
                activation_bytes=first.activation_bytes + second.activation_bytes,
            )
            for first, second in zip(self.layers[::2], self.layers[1::2], strict=True)
        )
        return replace(self, layers=layers, in_halves=False)

    # Partitions ask for every stage that there could be, so what lies between two layers is summed once.
    @functools.cached_property
    def _parameters_before(self) -> list[Parameters]:
        return [*itertools.accumulate((layer.parameters for layer in self.layers), initial=NO_PARAMETERS)]

    @functools.cached_property
    def _times_from(self) -> list[list[float]]:
        return _sums_from([layer.time for layer in self.layers])

    @functools.cached_property
    def _kept_from(self) -> list[list[float]]:
        return _sums_from([layer.activation_bytes for layer in self.layers])

    def parameters(self, first: int, end: int) -> Parameters:
        """Parameters of a stage that owns layers [first, end)."""
        count = self._parameters_before[end] - self._parameters_before[first]
        if first == 0:
            count += self.embedding_parameters
        if end == len(self.layers):
            count += self.head_parameters
            if first == 0:
                count -= self.tied_parameters
        return count

    def share_of_whole(self, slices: int) -> float:
        """How much of the model is whole on each of the processes that share it, of parameters, where they are more."""
        held = self.parameters(0, len(self.layers)).total * slices / self.model_parameters.total
        return max(0.0, (held - 1) / (slices - 1))

    def time(self, first: int, end: int) -> float:
        """Time of a stage for one micro-batch, forward and backward."""
        total = self._times_from[first][end - first]
        total += self.embedding_time if first == 0 else 0.0
        return total + (self.head_time if end == len(self.layers) else 0.0)

    def memory(self, first: int, end: int, *, in_flight: int) -> float:
        """Estimated peak bytes of a stage that keeps `in_flight` micro-batches between forward and backward."""
        kept = self._kept_from[first][end - first]
        kept += self.embedding_activation_bytes if first == 0 else self.boundary_bytes
        parameters = self.parameters(first, end)
        frozen = parameters.total - parameters.trained - parameters.quantised
        total = self.state.trained * parameters.trained + self.state.frozen * frozen
        total += self.state.quantised * parameters.quantised
        total += in_flight * kept + self.transient_bytes
        return total + (self.head_activation_bytes if end == len(self.layers) else 0.0)


def estimate_costs(
    config: PretrainedConfig,
    *,
    sequence_length: int = 2048,
    micro_batch_size: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    checkpoint_interval: int = 0,
    checkpoint_offload: bool = False,
    state: StateBytes | None = None,
    selection: ParameterChoice | None = None,
    attach: Callable[[PreTrainedModel], object] | None = None,
    quantised: Collection[str] = (),
    family: type[PreTrainedModel] | None = None,
    is_whole: bool = False,
    is_fused: bool = False,
    is_compiled: bool = False,
    in_halves: bool = False,
    slices: int = 1,
    shares: int = 1,
    sharded_norms: bool = False,
    counted: CountedModel | None = None,
) -> Costs:
    """The cost model of `config`, from shapes alone.

    Args:
        config: of the model.
        sequence_length: tokens of a row.
        micro_batch_size: rows of a micro-batch.
        dtype: of weights and activations.
        checkpoint_interval: every so many layers are recomputed; 0 for none.
        checkpoint_offload: what these keep is in host memory.
        state: bytes per parameter; None for `state_bytes(dtype)`.
        selection: which parameters train; None for all.
        attach: gives the model without memory what is trained beside it.
        quantised: names of the parameters that are held in few bits.
        family: the model's class; None for the one that transformers has for `config`.
        is_whole: for one stage, where a model of any shape will do; one without a list of layers then counts as a
            single layer.
        is_fused: the loss is fused with the product of a plain head.
        is_compiled: decoder layers are compiled, and keep less for the backward pass.
        in_halves: stages may be cut inside layers, so what these cost is given by halves.
        slices: processes that share every matrix of a stage (tensor parallelism); costs are those of one of them.
        shares: processes that share the tokens of every row (sequence parallelism); costs are those of one of them.
        sharded_norms: slices share the tokens between attention and mlp.
        counted: the model without memory, with what `attach` gives it and the halves of its layers, where many
            estimates are made of one; None to build it.

    Raises:
        UserError: the model has no list of layers that could be split, or not what `selection` names; or its layers
            cannot be cut inside.
    """
    counted = counted or CountedModel.of(
        config, family, dtype=dtype, attach=attach, is_whole=is_whole, in_halves=in_halves
    )
    model, structure, layers = counted.model, counted.structure, [*counted.layers]
    is_cut = counted.cut_parameters() if slices > 1 else frozenset()

    def parts(parameter: nn.Parameter) -> int:
        return slices if id(parameter) in is_cut else 1

    text = config.get_text_config(decoder=True)
    tokens = math.ceil(sequence_length / shares) * micro_batch_size
    hidden_bytes = float(tokens * text.hidden_size * dtype.itemsize)
    passes = _RECOMPUTED if checkpoint_interval else _TRAINING
    # Layers that differ in shape have configurations of their own (Gemma 4).
    by_layer = structure.layers and getattr(text, "is_heterogeneous", False)
    configs = list(text.per_layer_config) if by_layer else [text] * len(layers)
    types = (structure.layers and getattr(text, "layer_types", None)) or [""] * len(layers)
    kinds = [f"{type(layer).__name__} {kind}".rstrip() for layer, kind in zip(layers, types, strict=True)]
    units = 1 + in_halves
    # What has scores: layers, or the first of their halves.
    attentions = [*types]
    if in_halves:
        pairs = (as_modules(layer, each) for layer, each in zip(layers, counted.halves, strict=True))
        layers = [half for pair in pairs for half in pair]
        configs = [each for each in configs for _ in range(units)]
        kinds = [each for each in kinds for _ in range(units)]
        attentions = [each for kind in types for each in (kind, None)]
    share = 1 / units
    few_bits = {id(each) for name, each in counted.parameters if name in quantised}
    copies = dict(structure.tied)
    names = [copies.get(name, name) for name, _ in counted.parameters]
    chosen = set(names)
    if selection is not None:
        chosen = set(
            matching(
                structure.parameters,
                selection,
                layers=structure.layers,
                num_layers=structure.num_layers,
                attached=[name for name in names if name not in structure.parameters],
            )
        )
    trained = {id(each) for name, (_, each) in zip(names, counted.parameters, strict=True) if name in chosen}

    firsts: dict[Any, int] = {}
    alike = [
        firsts.setdefault((id(own), kind, _shapes(layer, parts, trained, few_bits)), index)
        for index, (layer, own, kind) in enumerate(zip(layers, configs, attentions, strict=True))
    ]
    unlike = sorted(firsts.values())
    # Into how many parts the hidden states between attention and mlp are cut.
    between = slices if sharded_norms else 1
    bytes_of = {
        index: tokens
        * activation_bytes_per_token(
            layers[index],
            configs[index],
            dtype.itemsize,
            0.0 if is_compiled else share,
            parts,
            trained=trained,
            between=between,
        )
        + dtype.itemsize * unpacked(layers[index], few_bits)
        for index in unlike
    }
    full = [bytes_of[index] for index in alike]
    kept = full
    if checkpoint_interval:
        kept = [0.0 if checkpoint_offload else share * hidden_bytes / between / checkpoint_interval] * len(full)

    def count(parameters: Iterable[nn.Parameter], parts: Parts = parts) -> Parameters:
        known = [(id(each), math.ceil(each.numel() / parts(each))) for each in parameters]
        return Parameters(
            total=sum(size for _, size in known),
            trained=sum(size for each, size in known if each in trained),
            quantised=sum(size for each, size in known if each in few_bits),
        )

    before, after = ([*_parameters(model, names)] for names in (structure.before, structure.after))
    in_both = {id(each) for each in before} & {id(each) for each in after}
    # An objective takes the logits of a large vocabulary in chunks, which are computed twice where it is not fused.
    vocabulary = math.ceil(text.vocab_size / slices)
    logits = held = tokens * vocabulary
    is_apart = has_head_apart(type(model))
    is_fused = is_fused and has_plain_head(type(model))
    itemsize = dtype.itemsize if is_fused else 4  # what is not fused has fp32 copies
    is_summed = is_fused and any(id(each) in trained for each in after)
    held = min(logits, tokens_of_a_chunk(vocabulary, itemsize=itemsize, is_trained=is_summed) * vocabulary)

    def work(parts: Parts) -> tuple[list[float], list[float], float, float]:
        """Operations a token: of layers, forward; what their backward passes are spared; the same of the head."""
        per_token, spared = {}, {}
        for index in unlike:
            layer, own, kind = layers[index], configs[index], attentions[index]
            used = weights_used(layer, own, parts)
            scores = 0.0 if kind is None else attention_operations(own, kind, sequence_length)
            per_token[index] = 2.0 * used + scores / parts_of_attention(layer, parts)
            # The backward pass makes no gradients of frozen weights.
            spared[index] = 2.0 * (used - weights_used(layer, own, parts, trained))
        ends = [model.get_submodule(name) for name in structure.after]
        products = sum(weights_used(end, text, parts) for end in ends)
        frozen = products - sum(weights_used(end, text, parts, trained) for end in ends)
        of_layers = ([found[index] for index in alike] for found in (per_token, spared))
        return *of_layers, 2.0 * products, 2.0 * frozen  # type: ignore[return-value]

    per_token, spared, head_per_token, head_spared = work(parts)
    whole = work(in_one_part) if is_cut else (per_token, spared, head_per_token, head_spared)
    counts = {index: count(layers[index].parameters()) for index in unlike}
    is_repeated = is_apart and held < logits and not is_fused
    return Costs(
        layers=tuple(
            LayerCost(
                kind=kinds[index],
                parameters=counts[first],
                time=tokens * (passes * per_token[index] - spared[index]),
                activation_bytes=kept[index],
            )
            for index, first in enumerate(alike)
        ),
        in_halves=in_halves,
        embedding_parameters=count(before),
        head_parameters=count(after),
        embedding_time=0.0,
        head_time=tokens * ((_RECOMPUTED if is_repeated else _TRAINING) * head_per_token - head_spared),
        embedding_activation_bytes=8.0 * tokens,
        # Logits in the compute dtype, and fp32 logits with their gradient inside a loss that is not fused.
        head_activation_bytes=float((held if is_apart else logits) * dtype.itemsize + held * 8 * (not is_fused))
        # A chunk's share of the gradient, before it is added.
        + is_fused * (head_per_token - head_spared) / 2 * dtype.itemsize,
        boundary_bytes=hidden_bytes,
        transient_bytes=checkpoint_interval * max(sum(full[at : at + units]) for at in range(0, len(full), units)),
        state=state or state_bytes(dtype),
        operations=shares * tokens * (_TRAINING * (sum(whole[0]) + whole[2]) - sum(whole[1]) - whole[3]),
        tied_parameters=count(each for each in before if id(each) in in_both),
        model_parameters=count(model.parameters(), in_one_part),
    )


def _sums_from(numbers: Sequence[float]) -> list[list[float]]:
    """Of each number and all after it the sums of the first ones, in their order: equal layers have equal sums."""
    return [[*itertools.accumulate(numbers[first:], initial=0.0)] for first in range(len(numbers) + 1)]


def _shapes(layer: nn.Module, parts: Parts, *chosen: Collection[int]) -> tuple[Any, ...]:
    """What the costs of a layer depend on, beside its configuration and kind."""
    return tuple(
        (name, each.shape, parts(each), *(id(each) in some for some in chosen))
        for name, each in layer.named_parameters()
    )


def with_timings(costs: Costs, *, layers: Sequence[float], embedding: float, head: float) -> Costs:
    """The same costs with measured seconds in place of estimated time."""
    assert len(layers) == len(costs.layers)
    timed = tuple(replace(layer, time=seconds) for layer, seconds in zip(costs.layers, layers, strict=True))
    return replace(costs, layers=timed, embedding_time=embedding, head_time=head, is_measured=True)


def _parameters(model: PreTrainedModel, names: Iterable[str]) -> Iterator[nn.Parameter]:
    """Each parameter of these modules once."""
    modules = nn.ModuleList(model.get_submodule(name) for name in names)
    return modules.parameters()
