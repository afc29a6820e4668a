"""Which decoder layers go to which pipeline stage, and a table that shows what each stage costs.

    fast          the slowest stage is as fast as possible (the head counts, so a last stage has fewer layers)
    profile       the same on measured times
    mem           the fullest stage is as small as possible; earlier stages hold more micro-batches in flight
    parameters    the largest stage, by parameters, is as small as possible
    uniform       equal numbers of layers; the first stages take what is left over
    type:REGEX    equal numbers of layers whose class or layer type matches
    9,5           9 layers on the first stage, 5 on the last one, the rest even
    0,8,17,26     boundaries: stage k owns layers [b[k], b[k+1])

All but uniform and the last two search all splits (dynamic programming) and give the best one on the cost model of
`jllm.models.pipeline.costs`: optimal, not approximate. They cut only where the family can be cut. Every stage owns at
least one layer.

Costs of half layers make these the units (`--split_dlayer`): numbers that are given count them, every stage owns at
least one, and fast, profile, mem and parameters cut inside layers where the worst stage gets better by it, and as few
as that takes. uniform and type still count layers.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable

from transformers import PretrainedConfig

from jllm.errors import UserError
from jllm.models.families import possible_starts
from jllm.models.pipeline.costs import Costs, estimate_costs
from jllm.models.pipeline.span import StageSpan, spans_of
from jllm.models.pipeline.structure import count_layers

METHODS = ("fast", "mem", "uniform", "parameters", "profile")
LEAST_GAIN = 0.002
"""Cuts inside layers are worth it where the worst stage needs that much less; what a cut itself costs is below it."""


def partition(
    method: str,
    *,
    config: PretrainedConfig,
    num_stages: int,
    micro_batches: int | None = None,
    costs: Costs | None = None,
    overlaps: bool = False,
) -> list[int]:
    """Boundaries: num_stages + 1 increasing layer numbers, from 0 to the number of decoder layers; numbers of half
    layers where `costs` are of these.

    `micro_batches` is how many a step has (gradient accumulation steps); it bounds how many are in flight, of which
    there are more where transfers overlap with compute. `costs` default to estimates for `config`; `profile` is `fast`
    on measured ones, so it needs them.

    Raises:
        UserError: more stages than layers, or a `method` that is none or does not fit this model.
    """
    units = 1
    if costs is not None and costs.in_halves:
        if method == "uniform" or method.startswith("type:"):
            layers = partition(method, config=config, num_stages=num_stages, costs=costs.of_layers())
            return [2 * bound for bound in layers]
        units = 2
    what = "half layers" if units == 2 else "layers"
    num_layers = units * count_layers(config)
    if num_stages < 1:
        raise UserError(f"{num_stages} pipeline stages: a pipeline needs at least 1; set --pipe_parallel_size")
    if num_stages > num_layers:
        raise UserError(
            f"{num_stages} pipeline stages for a model of {num_layers} {what}: every stage needs at least one; "
            f"set --pipe_parallel_size to {num_layers} or fewer"
        )
    if re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", method):
        return _explicit(method, num_layers, num_stages, what)
    if method == "uniform":
        return _even(0, num_layers, num_stages)
    if method not in METHODS and not method.startswith("type:"):
        raise UserError(
            f"--partition_method {method!r} is not a method; give one of {', '.join(METHODS)}, type:REGEX, "
            '"9,5" (layers of the first and the last stage) or boundaries such as "0,8,17,26"'
        )
    if costs is None:
        costs = estimate_costs(config)
    starts = possible_starts(config)

    def split(cost: Callable[[int, int, int], float]) -> list[int]:
        def possible(first: int, end: int, stage: int) -> float:
            # The first layer whose attention is on the stage.
            own = -(-first // units)
            is_barred = starts is not None and own and own * units < end and own not in starts
            return math.inf if is_barred else cost(first, end, stage)

        return (best_split if units == 1 else best_in_halves)(num_layers, num_stages, possible)

    if method.startswith("type:"):
        counts = _matches_of_type(method.removeprefix("type:"), costs)
        return split(lambda first, end, _: sum(counts[first:end]))
    if method == "profile" and not costs.is_measured:
        raise UserError("--partition_method profile needs measured layer times; give fast where nothing was measured")
    if method == "parameters":
        return split(lambda first, end, _: float(costs.parameters(first, end).total))
    if method == "mem":
        return split(
            lambda first, end, stage: costs.memory(
                first, end, in_flight=micro_batches_in_flight(stage, num_stages, micro_batches, overlaps=overlaps)
            )
        )
    return split(lambda first, end, _: costs.time(first, end))


def micro_batches_in_flight(stage: int, num_stages: int, micro_batches: int | None, *, overlaps: bool = False) -> int:
    """How many micro-batches a stage keeps between their forward and backward pass.

    1F1B keeps as many as there are stages from this one on. Where transfers overlap with compute, each link in between
    holds one more.
    """
    waiting = num_stages - stage + (num_stages - stage - 1 if overlaps else 0)
    return waiting if micro_batches is None else min(waiting, micro_batches)


def best_split(num_layers: int, num_stages: int, cost: Callable[[int, int, int], float]) -> list[int]:
    """Boundaries whose largest `cost(first, end, stage)` is smallest; among equals the most even split.

    `cost` grows with the layers of a stage. At most O(stages · layers²) evaluations of it.
    """
    return _split(num_layers, num_stages, cost, lambda largest, own, end: max(largest, own))


def best_in_halves(num_halves: int, num_stages: int, cost: Callable[[int, int, int], float]) -> list[int]:
    """The same in half layers: the split between whole layers, unless the largest cost is less with cuts inside them;
    then the one with the fewest of these that is as good."""
    if num_stages == 1:
        return [0, num_halves]
    cost = functools.cache(cost)

    def worst(bounds: list[int]) -> float:
        return max(cost(first, end, stage) for stage, (first, end) in enumerate(itertools.pairwise(bounds)))

    limit = worst(best_split(num_halves, num_stages, cost))
    if num_stages <= num_halves // 2:
        layers = best_split(num_halves // 2, num_stages, lambda first, end, stage: cost(2 * first, 2 * end, stage))
        whole = [2 * bound for bound in layers]
        if worst(whole) * (1 - LEAST_GAIN) <= limit:
            return whole
    limit *= 1 + 1e-9  # sums are rounded

    def cuts(so_far: float, own: float, end: int) -> float:
        return so_far + end % 2 if own <= limit else math.inf

    return _split(num_halves, num_stages, cost, cuts)


def _split(
    num_layers: int,
    num_stages: int,
    cost: Callable[[int, int, int], float],
    add: Callable[[float, float, int], float],
) -> list[int]:
    """Boundaries for which `add(what the stages before add up to, own cost, end)` is smallest; among equals the most
    even split."""
    # best[end] = (what is smallest, sum of squares, boundaries) for the stages so far to own exactly layers [0, end).
    best: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0.0, 0.0, (0,))}
    for stage in range(num_stages):
        remaining = num_stages - stage - 1
        following: dict[int, tuple[float, float, tuple[int, ...]]] = {}
        ends = [num_layers] if remaining == 0 else range(stage + 1, num_layers - remaining + 1)
        for end in ends:
            # From the shortest stage on, until longer ones are worse than what is known however the others are.
            for first, (largest, squares, bounds) in reversed(best.items()):
                if first >= end:
                    continue
                own = cost(first, end, stage)
                least = add(0.0, own, end)
                if own < math.inf and (least == math.inf or (end in following and following[end][0] < least)):
                    break
                candidate = (add(largest, own, end), squares + own * own, (*bounds, end))
                if end not in following or candidate < following[end]:
                    following[end] = candidate
        best = following
    return list(best[num_layers][2])


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageFacts:
    """What one stage is estimated to cost.

    Attributes:
        first_layer, end_layer, starts_inside, ends_inside: what it owns, as in `StageSpan`.
        parameters, trained_parameters: how many it has, and how many of them train.
        memory_bytes: at its peak.
        time_share: of the time of all stages.
    """

    first_layer: int
    end_layer: int
    starts_inside: bool
    ends_inside: bool
    parameters: int
    trained_parameters: int
    memory_bytes: float
    time_share: float


def stage_facts(
    costs: Costs, boundaries: list[int], *, micro_batches: int | None = None, overlaps: bool = False
) -> list[StageFacts]:
    """What each stage is estimated to cost."""
    count = len(boundaries) - 1
    times = _times(costs, boundaries)
    found = []
    spans = spans_of(boundaries, in_halves=costs.in_halves)
    for stage, (first, end) in enumerate(itertools.pairwise(boundaries)):
        parameters = costs.parameters(first, end)
        in_flight = micro_batches_in_flight(stage, count, micro_batches, overlaps=overlaps)
        found.append(
            StageFacts(
                first_layer=spans[stage].first_layer,
                end_layer=spans[stage].end_layer,
                starts_inside=spans[stage].starts_inside,
                ends_inside=spans[stage].ends_inside,
                parameters=parameters.total,
                trained_parameters=parameters.trained,
                memory_bytes=costs.memory(first, end, in_flight=in_flight),
                time_share=times[stage] / (sum(times) or 1.0),
            )
        )
    return found


def fullest_stage(
    costs: Costs, boundaries: list[int], *, micro_batches: int | None = None, overlaps: bool = False
) -> float:
    """Estimated peak bytes of the stage that needs most."""
    facts = stage_facts(costs, boundaries, micro_batches=micro_batches, overlaps=overlaps)
    return max(stage.memory_bytes for stage in facts)


def imbalance(costs: Costs, boundaries: list[int]) -> float:
    """How much longer the slowest stage takes than the mean of all: 0.5 is half as long again."""
    times = _times(costs, boundaries)
    return max(times) * len(times) / (sum(times) or 1.0) - 1


def _times(costs: Costs, boundaries: list[int]) -> list[float]:
    return [costs.time(first, end) for first, end in itertools.pairwise(boundaries)]


def stage_table(
    costs: Costs,
    boundaries: list[int],
    *,
    micro_batches: int | None = None,
    memory_limit: float | None = None,
    overlaps: bool = False,
) -> str:
    """Layers, parameters, estimated memory and time share of each stage, and the share of time lost to the bubble.

    A stage that is estimated to need more than `memory_limit` bytes is marked.
    """
    count = len(boundaries) - 1
    spans = spans_of(boundaries, in_halves=costs.in_halves)
    lines = [f"{'stage':>5}  {'layers':>11}  {'parameters':>10}  {'memory':>9}  {'time':>6}"]
    for number, stage in enumerate(stage_facts(costs, boundaries, micro_batches=micro_batches, overlaps=overlaps)):
        extras = [name for name, has in (("embedding", number == 0), ("head", number == count - 1)) if has]
        if stage.trained_parameters < stage.parameters:
            extras.append(f"{_si(stage.trained_parameters)} train")
        over = memory_limit is not None and stage.memory_bytes > memory_limit
        warning = "  over the device's memory" if over else ""
        lines.append(
            f"{number:>5}  {_layers_of(spans[number]):>11}  {_si(stage.parameters):>10}  "
            f"{stage.memory_bytes / 2**30:>5.1f} GiB  {100 * stage.time_share:>5.1f}%"
            f"  {' + '.join(extras)}{warning}".rstrip()
        )
    if any(span.ends_inside for span in spans):
        lines.append("a layer is cut where numbers end in a and begin in m: attention before, mlp behind the cut")
    how = "measured" if costs.is_measured else "estimated"
    lines.append(
        f"time {how}; slowest stage {100 * imbalance(costs, boundaries):.1f}% over the mean;"
        f" {_bubble(count, micro_batches)}"
    )
    return "\n".join(lines)


def _layers_of(span: StageSpan) -> str:
    """For people: 0-3 (4), or with halves 0-3a (3.5) and 3m-7 (4.5)."""
    first, last = f"{span.first_layer}{'m' * span.starts_inside}", f"{span.end_layer - 1}{'a' * span.ends_inside}"
    return f"{first}-{last} ({span.num_layers:g})"


def bubble_share(num_stages: int, micro_batches: int) -> float:
    """Share of a step in which a stage of a balanced pipeline waits: (P - 1) / (M + P - 1)."""
    return (num_stages - 1) / (micro_batches + num_stages - 1)


def _bubble(num_stages: int, micro_batches: int | None) -> str:
    if micro_batches is None:
        return f"bubble {num_stages - 1} / (micro-batches + {num_stages - 1})"
    return f"bubble {100 * bubble_share(num_stages, micro_batches):.1f}% with {micro_batches} micro-batches a step"


def _even(first: int, end: int, parts: int) -> list[int]:
    size, rest = divmod(end - first, parts)
    bounds = [first]
    for part in range(parts):
        bounds.append(bounds[-1] + size + (1 if part < rest else 0))
    return bounds


def _explicit(method: str, num_layers: int, num_stages: int, what: str) -> list[int]:
    numbers = [int(number) for number in method.split(",")]
    given = f"--partition_method {method!r}"
    if len(numbers) == num_stages + 1 and (numbers[0] == 0 or num_stages != 1):
        if numbers[0] != 0 or numbers[-1] != num_layers:
            raise UserError(f"{given}: boundaries start with 0 and end with {num_layers}, the model's number of {what}")
        if any(right <= left for left, right in itertools.pairwise(numbers)):
            raise UserError(f"{given} leaves a stage without {what}; boundaries must increase from 0 to {num_layers}")
        return numbers
    if len(numbers) == 2 and num_stages >= 2:
        first, last = numbers
        middle = num_layers - first - last
        if first < 1 or last < 1 or middle < num_stages - 2 or (num_stages == 2 and middle != 0):
            needed = f"{num_layers}" if num_stages == 2 else f"at most {num_layers - (num_stages - 2)}"
            raise UserError(
                f"{given} puts {first} {what} on the first of {num_stages} stages and {last} on the last one; "
                f"both must be at least 1 and together {needed}, so that every stage has one"
            )
        if num_stages == 2:
            return [0, first, num_layers]
        return [0, *_even(first, num_layers - last, num_stages - 2), num_layers]
    raise UserError(
        f"{given} has {len(numbers)} numbers; give 2 ({what} of the first and the last stage) "
        f"or {num_stages + 1} boundaries from 0 to {num_layers} for {num_stages} stages"
    )


def _matches_of_type(pattern: str, costs: Costs) -> list[float]:
    """For each layer 1 where `pattern` matches its kind, else 0."""
    try:
        expression = re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise UserError(f"--partition_method type:{pattern}: not a regular expression ({error})") from None
    counts = [1.0 if expression.search(layer.kind) else 0.0 for layer in costs.layers]
    if not any(counts):
        kinds = ", ".join(sorted({layer.kind for layer in costs.layers}))
        raise UserError(f"--partition_method type:{pattern} matches no layer; the model's layers are: {kinds}")
    return counts


def _si(number: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return f"{number:.0f}"


def check_cuts(*, emb_partitions: int = 1) -> None:
    """Refuse cuts that are not offered, and say what they would bring at most (`benchmarks/half_layers.py`)."""
    if emb_partitions != 1:
        raise UserError(
            f"--emb_partitions {emb_partitions}: embedding and head stay whole, on the first and the last stage, and "
            "--partition_method fast gives these fewer layers; where stages have 8 or more layers, a head in parts "
            "would make the slowest one at most 10% faster: leave it out, or use fewer stages"
        )
