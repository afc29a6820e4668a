"""The layouts in which a model can train on a cluster, with what each needs and how fast it should be, best first.

Memory is that of the stage table (`jllm.models.pipeline.costs`). The seconds of a step:

    (M + P - 1) x (slowest stage's operations / (peak x share) + its exchanges inside a micro-batch)
    + 2 (M + P - 1) x the hidden state over the slowest link between stages
    + sum of gradients over the pipelines, and the new weights back where they share the optimizer's state

with M micro-batches in P stages. Nothing of the exchanges is taken to overlap with compute. Exchanges of a layer and
micro-batch, n processes, hidden state of h bytes: tensor parallelism 4 (with recomputation 6) sums of h over n, each of
which passes 2 (n - 1) / n x h (a ring); sequence parallelism the smaller of exchanged heads and gathered keys, there
and back. The share of the peak is what was measured on one device (`SHARE`, benchmarks/README.md), which counts
everything that is not a product of matrices.

Costs: 0.2 s for each way of sharing a layer of a 70B model, some milliseconds a layout.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from transformers import PretrainedConfig, PreTrainedModel

from jllm.errors import UserError
from jllm.models.families import VOCABULARY, check_split, shown_slices
from jllm.models.pipeline.costs import Costs, StateBytes, estimate_costs, state_bytes
from jllm.models.pipeline.counted import CountedModel
from jllm.models.pipeline.partition import bubble_share, micro_batches_in_flight, partition
from jllm.models.pipeline.span import spans_of
from jllm.models.pipeline.structure import count_layers
from jllm.models.sequence_parallel.checks import check_sequence_parallel
from jllm.models.sizes import size_of
from jllm.models.tensor_parallel.checks import check_tensor_parallel
from jllm.models.trainable import ParameterChoice
from jllm.models.weights.quantisation import QuantisationPlan
from jllm.models.weights.source import causal_class
from jllm.parallel.mesh import Mesh
from jllm.train.optim.optimizers import KINDS
from jllm.train.options.optimizer import WITHOUT_MASTERS
from jllm.train.planning.cluster import Cluster
from jllm.train.quantisation import check_cut

if TYPE_CHECKING:  # peft is not there in every installation
    from jllm.models.adapters.lora_plan import LoraPlan

SHARE, SHARE_EAGER, SHARE_OF_RUNS = 0.57, 0.45, 0.48
"""Of the peak, that one device reached, 8 layers of 4,096 on an H200: compiled decoder layers, others, and compiled
ones whose attention is not, where processes share rows; links not counted."""
ITEM = 2
"""Bytes of an element of what is exchanged."""
INTERVALS = (0, 1)
"""Every so many layers are recomputed."""
MOST_SHARING = 64
"""Processes that share a row, as the trainer has it."""
MOST_ROWS = 8
"""Of a micro-batch: more gain nothing where rows are long."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a plan is for.

    Attributes:
        config: of the model.
        length: tokens of a row.
        rows: of a step, over all pipelines.
        optimizer: by the name that `--optimizer` has for it.
        lora: where adapters go that are trained in the model's place; None where it trains itself.
        quantised: what of the model is held in few bits; None where nothing is.
        split_dlayer: whether stages may be cut inside layers.
        sharded_norms: whether slices share the tokens between attention and mlp.
    """

    config: PretrainedConfig
    length: int
    rows: int
    optimizer: str
    lora: "LoraPlan | None" = None
    quantised: QuantisationPlan | None = None
    split_dlayer: bool = False
    sharded_norms: bool = False

    @functools.cached_property
    def counted(self) -> CountedModel:
        """The model without memory, with its adapters."""
        return CountedModel.of(self.config, attach=self._attach, in_halves=self.split_dlayer)

    def _attach(self, model: PreTrainedModel) -> None:
        if self.lora is not None:
            from jllm.models.adapters.lora import attach_lora  # here: peft may not be there

            attach_lora(model, self.lora, seed=0, dtype=torch.float32)

    @property
    def has_masters(self) -> bool:
        """Whether what trains has an fp32 copy; adapters are fp32 themselves."""
        return self.lora is None and self.optimizer not in WITHOUT_MASTERS

    def state(self, copies: int) -> StateBytes:
        """Of a parameter, where so many ranks have the same stage."""
        moments = KINDS[self.optimizer].moments
        if self.lora is not None:
            found = state_bytes(torch.float32, moments=moments)
            few = self.quantised.quantisation.bytes_of_a_parameter if self.quantised is not None else 0.0
            return dataclasses.replace(found, frozen=float(ITEM), quantised=few)
        return state_bytes(
            torch.bfloat16,
            moments=moments,
            has_masters=self.has_masters,
            sharded_over=copies if self.has_masters else None,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How devices are divided.

    Attributes:
        pipe, data, sequence, tensor: sizes of the axes.
        rows: of a micro-batch.
        micro_batches: of a step, for one pipeline.
        interval: every so many layers are recomputed; 0 for none.
    """

    pipe: int
    data: int
    sequence: int
    tensor: int
    rows: int
    micro_batches: int
    interval: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a layout should need.

    Attributes:
        layout: of the devices.
        boundaries: of the stages, in decoder layers; a half more is between attention and mlp.
        memory: bytes of the fullest device.
        seconds: of a step.
        tokens_per_second: over all devices.
        utilisation: of the devices' peak, recomputation not counted.
        bubble: share of the time in which stages wait for the pipeline to fill and drain.
        exchange: share of the time in which devices exchange.
    """

    layout: Layout
    boundaries: tuple[float, ...]
    memory: float
    seconds: float
    tokens_per_second: float
    utilisation: float
    bubble: float
    exchange: float


def plan(wanted: Wanted, cluster: Cluster) -> tuple[list[Estimate], Estimate | None]:
    """All layouts that fit, fastest first; and the one that needs least memory, whether it fits or not.

    None where no layout divides the devices and the rows.

    Raises:
        UserError: the model cannot be built, or has no list of decoder layers.
    """
    costs_of = functools.cache(functools.partial(_costs, wanted))
    costs_of(tensor=1, sequence=1, rows=1, interval=0)  # whatever is wrong with the model is said here
    found = []
    for layout in layouts(wanted, cluster):
        with contextlib.suppress(UserError):  # it cannot be cut into these stages
            found.append(estimate(wanted, cluster, layout, costs_of))
    fitting = [each for each in found if each.memory <= cluster.memory]
    fitting.sort(key=lambda each: (-each.tokens_per_second, each.memory))
    return fitting, min(found, key=lambda each: each.memory, default=None)


def layouts(wanted: Wanted, cluster: Cluster) -> Iterator[Layout]:
    """All that divide the devices, the rows and the model, in powers of two but for the stages."""
    devices = cluster.devices
    tensors = [size for size in _powers(cluster.devices_per_node) if why_not_cut(wanted, size) is None]
    longest = min(devices, wanted.length // 1024, MOST_SHARING)
    sequences = [1, *(size for size in _powers(longest)[1:] if why_not_shared(wanted, size) is None)]
    for tensor, sequence, pipe in itertools.product(tensors, sequences, range(1, count_layers(wanted.config) + 1)):
        mesh = Mesh.over(devices, pipe=pipe, sequence=sequence, tensor=tensor)
        if mesh is None or wanted.rows % mesh.data or (wanted.sharded_norms and min(tensor, sequence) > 1):
            continue
        own = wanted.rows // mesh.data
        for rows, interval in itertools.product(_powers(min(own, MOST_ROWS)), INTERVALS):
            if own % rows == 0:
                yield Layout(
                    pipe=pipe,
                    data=mesh.data,
                    sequence=sequence,
                    tensor=tensor,
                    rows=rows,
                    micro_batches=own // rows,
                    interval=interval,
                )


def estimate(
    wanted: Wanted, cluster: Cluster, layout: Layout, costs_of: Callable[..., Costs] | None = None
) -> Estimate:
    """What one layout should need.

    Args:
        costs_of: costs by tensor, sequence, rows and interval; None to estimate them.

    Raises:
        UserError: the model cannot be cut into so many stages.
    """
    given = {name: getattr(layout, name) for name in ("tensor", "sequence", "rows", "interval")}
    costs = (costs_of or functools.partial(_costs, wanted))(**given)
    costs = dataclasses.replace(costs, state=wanted.state(layout.data * layout.sequence))
    boundaries = partition(
        "fast",
        config=wanted.config,
        num_stages=layout.pipe,
        micro_batches=layout.micro_batches,
        costs=costs,
    )
    spans = spans_of(boundaries, in_halves=costs.in_halves)
    for span in spans:
        check_split(wanted.config, span)
    stages = [*itertools.pairwise(boundaries)]
    share = SHARE if _is_compiled(wanted, layout.tensor) else SHARE_EAGER
    share = min(share, SHARE_OF_RUNS if layout.sequence > 1 else SHARE)
    exchanges = [
        _sums_of_a_layer(wanted, cluster, layout) * span.num_layers
        # The first half of a layer has its attention.
        + _exchange_of_attention(wanted, cluster, layout) * (span.end_layer - span.first_layer - span.starts_inside)
        + _exchange_of_ends(wanted, cluster, layout) * (span.is_first + span.is_last)
        for span in spans
    ]
    times = [costs.time(first, end) / (cluster.operations * share) for first, end in stages]
    turns = layout.micro_batches + layout.pipe - 1
    slowest, shared = max(zip(times, exchanges, strict=True), key=sum)
    hand_over = 2 * _hidden(wanted, layout) / _link_between_stages(cluster, layout) if layout.pipe > 1 else 0.0
    gradients = max(
        _sum_of_gradients(wanted, cluster, layout, float(costs.parameters(*stage).trained)) for stage in stages
    )
    exchange = turns * (shared + hand_over) + gradients
    seconds = turns * slowest + exchange
    operations = costs.operations * layout.micro_batches * layout.data
    fullest = max(
        costs.memory(*stage, in_flight=micro_batches_in_flight(number, layout.pipe, layout.micro_batches))
        for number, stage in enumerate(stages)
    )
    return Estimate(
        layout=layout,
        boundaries=tuple(bound / 2 if costs.in_halves else bound for bound in boundaries),
        memory=fullest,
        seconds=seconds,
        tokens_per_second=wanted.rows * wanted.length / seconds,
        utilisation=operations / (seconds * cluster.operations * cluster.devices),
        bubble=bubble_share(layout.pipe, layout.micro_batches),
        exchange=exchange / seconds,
    )


def _costs(wanted: Wanted, *, tensor: int, sequence: int, rows: int, interval: int) -> Costs:
    is_compiled = _is_compiled(wanted, tensor)
    return estimate_costs(
        wanted.config,
        sequence_length=wanted.length,
        micro_batch_size=rows,
        checkpoint_interval=interval,
        is_fused=True,
        is_compiled=is_compiled,
        selection=ParameterChoice(attached_only=True) if wanted.lora is not None else None,
        quantised=wanted.quantised.parameters if wanted.quantised is not None else (),
        in_halves=wanted.split_dlayer,
        slices=tensor,
        shares=sequence,
        sharded_norms=wanted.sharded_norms,
        counted=wanted.counted,
    )


def _is_compiled(wanted: Wanted, tensor: int) -> bool:
    """Whether the trainer compiles layers: not those whose slices share tokens."""
    return not (wanted.sharded_norms and tensor > 1)


def left_out(wanted: Wanted) -> list[str]:
    """For people: why there are no layouts with stages, slices or shared rows."""
    reasons = why_not_split(wanted), why_not_cut(wanted, 2), why_not_shared(wanted, 2)
    return [*dict.fromkeys(each for each in reasons if each is not None)]


def why_not_split(wanted: Wanted) -> str | None:
    """Why the model cannot be cut into stages, whichever these are; None where it can."""
    try:
        check_split(wanted.config, spans_of([0, 1, max(2, count_layers(wanted.config))])[0])
    except UserError as error:
        return str(error)
    return None


def why_not_cut(wanted: Wanted, size: int) -> str | None:
    """Why so many processes cannot share the matrices of a stage; None where they can."""

    def check(config: PretrainedConfig, family: type[PreTrainedModel], size: int) -> None:
        check_tensor_parallel(config, family, size, sharded_norms=wanted.sharded_norms)
        if wanted.quantised is not None:
            check_cut(wanted.quantised, config, family, size)
        _costs(wanted, tensor=size, sequence=1, rows=1, interval=0)  # its layers may have parts that were not shown

    return _refusal(wanted, size, check)


def why_not_shared(wanted: Wanted, size: int) -> str | None:
    """Why so many processes cannot share the tokens of a row; None where they can."""
    return _refusal(wanted, size, check_sequence_parallel)


def _refusal(
    wanted: Wanted, size: int, check: Callable[[PretrainedConfig, type[PreTrainedModel], int], None]
) -> str | None:
    if size == 1:
        return None
    try:
        check(wanted.config, causal_class(wanted.config), size)
    except UserError as error:
        return str(error)
    return None


def _powers(most: int) -> list[int]:
    return [1 << power for power in range(most.bit_length())]


def _hidden(wanted: Wanted, layout: Layout) -> float:
    """Bytes of the hidden state that one process has of a micro-batch."""
    width = wanted.config.get_text_config(decoder=True).hidden_size
    return float(layout.rows * wanted.length / layout.sequence * width * ITEM)


def _link_between_stages(cluster: Cluster, layout: Layout) -> float:
    """Bytes a second for each process of a stage, over the slowest link; consecutive ranks are one pipeline."""
    inside = layout.tensor * layout.sequence
    if cluster.holds(inside * layout.pipe):
        return cluster.inside
    return min(cluster.inside, cluster.between / min(inside, cluster.devices_per_node))


def _sums_of_a_layer(wanted: Wanted, cluster: Cluster, layout: Layout) -> float:
    """Seconds of a micro-batch, forward and backward, in which slices sum; half of them behind attention."""
    # Layers that are whole on every process have nothing to sum.
    if shown_slices(type(wanted.counted.model)).how == VOCABULARY:
        return 0.0
    sums = 2 * _passes(layout) * 2 * (layout.tensor - 1) / layout.tensor
    return cluster.sends(layout.tensor, sums * _hidden(wanted, layout))


def _passes(layout: Layout) -> int:
    """Through a layer, for a micro-batch."""
    return 3 if layout.interval else 2


def _exchange_of_attention(wanted: Wanted, cluster: Cluster, layout: Layout) -> float:
    """The same of a layer's attention, in which those exchange that share rows."""
    text = wanted.config.get_text_config(decoder=True)
    tensor, sequence = layout.tensor, layout.sequence
    if sequence == 1:
        return 0.0
    heads = size_of(text, "num_attention_heads") / tensor
    keys = max((size_of(text, "num_key_value_heads") or heads * tensor) / tensor, 1.0)
    size = size_of(text, "head_dim") or text.hidden_size // size_of(text, "num_attention_heads")
    of_a_head = layout.rows * wanted.length / sequence * size * ITEM
    exchanged = (2 * heads + 2 * max(keys, sequence)) * of_a_head * (sequence - 1) / sequence
    gathered = 2 * keys * of_a_head * (sequence - 1)
    return cluster.sends(sequence, _passes(layout) * min(exchanged, gathered), stride=tensor)


def _exchange_of_ends(wanted: Wanted, cluster: Cluster, layout: Layout) -> float:
    """Seconds of a micro-batch: slices of the vocabulary sum the embedded tokens, or the gradient before the head."""
    return cluster.sends(layout.tensor, 2 * (layout.tensor - 1) / layout.tensor * _hidden(wanted, layout))


def _sum_of_gradients(wanted: Wanted, cluster: Cluster, layout: Layout, parameters: float) -> float:
    """Seconds of a step: fp32 sums (16 bits without masters), and weights back from those who share the masters."""
    copies = layout.data * layout.sequence
    is_fp32 = wanted.has_masters or wanted.lora is not None
    sent = 2 * (copies - 1) / copies * parameters * (4 if is_fp32 else ITEM)
    if wanted.has_masters:
        sent += (copies - 1) / copies * parameters * ITEM
    # Those that share rows lie beside each other, other copies at the same place of each pipeline.
    stride = layout.tensor * (layout.sequence * layout.pipe if layout.data > 1 else 1)
    return cluster.sends(copies, sent, stride=stride)
