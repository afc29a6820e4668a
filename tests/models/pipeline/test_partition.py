"""Partitions: boundaries are sound for any request, the searched ones are the best there are, mistakes are one line."""

import itertools
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jllm.errors import UserError
from jllm.models.families import check_split
from jllm.models.pipeline.costs import (
    Costs,
    LayerCost,
    estimate_costs,
    with_timings,
)
from jllm.models.pipeline.partition import (
    LEAST_GAIN,
    best_split,
    bubble_share,
    check_cuts,
    micro_batches_in_flight,
    partition,
    stage_table,
)
from jllm.models.pipeline.span import spans_of
from jllm.train.config import TrainConfig
from tests.models.pipeline.by_hand import all_of, config_of, costs_of
from tests.models.tiny import tiny_config


def all_splits(layers: int, stages: int) -> list[list[int]]:
    return [[0, *cut, layers] for cut in itertools.combinations(range(1, layers), stages - 1)]


@given(
    times=st.lists(st.floats(0.1, 10), min_size=1, max_size=10),
    head=st.floats(0, 20),
    stages=st.integers(1, 5),
    micro_batches=st.integers(1, 8),
    activation=st.floats(0, 50),
)
@settings(max_examples=150, deadline=None)
def test_searched_methods_are_best(
    times: list[float], head: float, stages: int, micro_batches: int, activation: float
) -> None:
    stages = min(stages, len(times))
    costs, config = costs_of(times, head=head, activation=activation), config_of(len(times))

    def slowest(bounds: list[int]) -> float:
        return max(costs.time(a, b) for a, b in itertools.pairwise(bounds))

    def fullest(bounds: list[int]) -> float:
        return max(
            costs.memory(a, b, in_flight=micro_batches_in_flight(k, stages, micro_batches))
            for k, (a, b) in enumerate(itertools.pairwise(bounds))
        )

    every = all_splits(len(times), stages)
    fast = partition("fast", config=config, num_stages=stages, costs=costs)
    mem = partition("mem", config=config, num_stages=stages, micro_batches=micro_batches, costs=costs)
    even = partition("uniform", config=config, num_stages=stages)
    assert fast in every
    assert mem in every
    assert even in every
    assert slowest(fast) <= 1.000001 * min(slowest(split) for split in every)
    assert fullest(mem) <= fullest(even)
    assert fullest(mem) <= 1.000001 * min(fullest(split) for split in every)
    assert max(b - a for a, b in itertools.pairwise(even)) - min(b - a for a, b in itertools.pairwise(even)) <= 1


@given(layers=st.integers(2, 40), stages=st.integers(2, 8), first=st.integers(1, 20), last=st.integers(1, 20))
@settings(max_examples=200, deadline=None)
def test_first_and_last(layers: int, stages: int, first: int, last: int) -> None:
    rest = layers - first - last
    is_possible = stages <= layers and (rest == 0 if stages == 2 else rest >= stages - 2)
    config = config_of(layers)
    if not is_possible:
        with pytest.raises(UserError):
            partition(f"{first},{last}", config=config, num_stages=stages)
        return
    bounds = partition(f"{first},{last}", config=config, num_stages=stages)
    sizes = [b - a for a, b in itertools.pairwise(bounds)]
    assert bounds[0] == 0
    assert bounds[-1] == layers
    assert len(sizes) == stages
    assert sizes[0] == first
    assert sizes[-1] == last
    assert stages == 2 or max(sizes[1:-1]) - min(sizes[1:-1]) <= 1


def test_boundaries_are_taken_as_given() -> None:
    assert partition("0,8,17,26", config=config_of(26), num_stages=3) == [0, 8, 17, 26]
    assert partition("9,5", config=config_of(26), num_stages=4) == [0, 9, 15, 21, 26]
    assert partition("0,26", config=config_of(26), num_stages=1) == [0, 26]


@pytest.mark.parametrize(
    ("method", "stages", "says"),
    [
        ("0,8,8,26", 3, "without layers"),
        ("0,8,17,25", 3, "end with 26"),
        ("1,8,17,26", 3, "start with 0"),
        ("0,8,17", 3, "4 boundaries"),
        ("25,5", 3, "at most 25"),
        ("9,5", 2, "together 26"),
        ("quick", 2, "fast, mem, uniform"),
        ("type:Nothing", 2, "LlamaDecoderLayer"),
        ("type:(", 2, "not a regular expression"),
        ("uniform", 27, "26 or fewer"),
        ("uniform", 0, "at least 1"),
        ("profile", 2, "measured"),
    ],
)
def test_mistakes(method: str, stages: int, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        partition(method, config=config_of(26), num_stages=stages)
    assert "\n" not in str(caught.value)


def test_type_balances_matching_layers() -> None:
    costs = costs_of([1.0] * 8)
    kinds = ["Mamba", "Mamba", "Attention", "Mamba", "Mamba", "Attention", "Attention", "Attention"]
    layers = tuple(
        LayerCost(kind=k, parameters=c.parameters, time=c.time, activation_bytes=c.activation_bytes)
        for k, c in zip(kinds, costs.layers, strict=True)
    )
    costs = Costs(**{**costs.__dict__, "layers": layers})
    bounds = partition("type:attention", config=config_of(8), num_stages=2, costs=costs)
    assert [kinds[a:b].count("Attention") for a, b in itertools.pairwise(bounds)] == [2, 2]


def test_estimates_know_the_head_and_the_flight() -> None:
    config = config_of(12, vocab=20_000)
    costs = estimate_costs(config, sequence_length=32)
    stages = [costs.parameters(a, b) for a, b in [(0, 4), (4, 9), (9, 12)]]
    assert costs.parameters(0, 12) == all_of(sum(stage.total for stage in stages))
    fast = partition("fast", config=config, num_stages=3, costs=costs)
    assert fast[3] - fast[2] < fast[1] - fast[0]
    assert partition("mem", config=config, num_stages=3, micro_batches=8, costs=costs)[-1] == 12
    timed = with_timings(costs, layers=[1.0] * 12, embedding=0.0, head=4.0)
    assert partition("profile", config=config, num_stages=2, costs=timed) == [0, 8, 12]


def test_table_shows_every_stage_and_the_bubble() -> None:
    table = stage_table(costs_of([1.0] * 6, head=2.0), [0, 4, 6], micro_batches=3)
    lines = table.splitlines()
    assert "0-3 (4)" in lines[1]
    assert "embedding" in lines[1]
    assert "4-5 (2)" in lines[2]
    assert "head" in lines[2]
    assert "50.0%" in lines[1]
    assert "bubble 25.0%" in lines[-1]
    assert bubble_share(1, 4) == 0


def test_table_marks_stages_that_do_not_fit() -> None:
    costs = costs_of([1.0] * 6, activation=100.0)
    limit = costs.memory(3, 6, in_flight=1) + 1
    lines = stage_table(costs, [0, 3, 6], micro_batches=2, memory_limit=limit).splitlines()
    assert ["over the device's memory" in line for line in lines] == [False, True, False, False]


def test_best_split_prefers_even_among_equals() -> None:
    assert best_split(6, 3, lambda first, end, stage: float(end - first)) == [0, 2, 4, 6]


def test_layers_that_share_a_selection_stay_together() -> None:
    """GLM-5 and its like: stages start with layers that select for themselves, which are 0, 3, 6 and 9 here."""
    config = tiny_config("glm_moe_dsa", num_hidden_layers=12, indexer_types=["full", "shared", "shared"] * 4)
    for method in ("fast", "mem", "parameters", "type:.*"):
        bounds = partition(method, config=config, num_stages=3)
        assert set(bounds[1:-1]) <= {3, 6, 9}, method
        assert bounds == sorted(set(bounds))
    for span in spans_of(bounds):
        check_split(config, span)
    with pytest.raises(UserError, match="begin stages with layers among 3, 6, 9"):
        check_split(config, spans_of([0, 6, 8, 12])[2])
    # Five stages do not fit: what is found cannot be cut, and `check_split` says so.
    five = partition("fast", config=config, num_stages=5)
    assert len(five) == 6
    assert not set(five[1:-1]) <= {3, 6, 9}


def in_halves(costs: Costs, shares: list[float]) -> Costs:
    """The same costs of half layers, of which the first has that share of a layer."""
    halves = [
        replace(
            layer,
            parameters=all_of(int(layer.parameters.total * share)),
            time=layer.time * share,
            activation_bytes=layer.activation_bytes * share,
        )
        for layer, first in zip(costs.layers, shares, strict=True)
        for share in (first, 1 - first)
    ]
    return replace(costs, layers=tuple(halves), in_halves=True)


@given(
    layers=st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.1, 0.9)), min_size=1, max_size=6),
    head=st.floats(0, 20),
    stages=st.integers(1, 5),
    method=st.sampled_from(["fast", "mem"]),
)
@settings(max_examples=100, deadline=None)
def test_layers_are_cut_only_where_that_helps(
    layers: list[tuple[float, float]], head: float, stages: int, method: str
) -> None:
    """The worst stage is the best there is, with the fewest cuts; between layers where cuts gain nothing."""
    whole = costs_of([time for time, _ in layers], head=head, activation=5.0)
    costs, stages = in_halves(whole, [share for _, share in layers]), min(stages, 2 * len(layers))

    def worst(bounds: list[int]) -> float:
        return max(
            costs.time(a, b)
            if method == "fast"
            else costs.memory(a, b, in_flight=micro_batches_in_flight(k, stages, 4))
            for k, (a, b) in enumerate(itertools.pairwise(bounds))
        )

    def cuts(bounds: list[int]) -> int:
        return sum(bound % 2 for bound in bounds)

    every = all_splits(2 * len(layers), stages)
    found = partition(method, config=config_of(len(layers)), num_stages=stages, micro_batches=4, costs=costs)
    least = min(map(worst, every))
    assert found in every
    if not cuts(found):
        assert worst(found) * (1 - 2 * LEAST_GAIN) <= least
        return
    assert worst(found) <= least * (1 + 1e-6)
    assert cuts(found) == min(cuts(split) for split in every if worst(split) <= least * (1 + 1e-12))
    assert all(worst(split) * (1 - LEAST_GAIN) >= least for split in every if not cuts(split))


def test_units_are_half_layers() -> None:
    costs, config = in_halves(costs_of([1.0] * 8), [0.25] * 8), config_of(8)
    for method, bounds in (
        ("11,5", [0, 11, 16]),
        ("0,5,16", [0, 5, 16]),
        ("uniform", [0, 8, 16]),
        ("type:layer", [0, 8, 16]),
    ):
        assert partition(method, config=config, num_stages=2, costs=costs) == bounds
    # As many stages as there are halves.
    assert partition("fast", config=config, num_stages=16, costs=costs) == list(range(17))
    for method, stages, says in (
        ("11,2", 2, "11 half layers on the first of 2 .* together 16"),
        ("0,5,8", 2, "end with 16, the model.s number of half layers"),
        ("fast", 17, "17 pipeline stages for a model of 16 half layers"),
    ):
        with pytest.raises(UserError, match=says):
            partition(method, config=config, num_stages=stages, costs=costs)


def test_table_shows_halves() -> None:
    costs = in_halves(costs_of([1.0] * 6, head=2.0), [0.25] * 6)
    lines = stage_table(costs, [0, 5, 6, 12]).splitlines()
    assert ["0-2a (2.5)" in lines[1], "2m-2 (0.5)" in lines[2], "3-5 (3)" in lines[3]] == [True] * 3
    assert "cut where numbers end in a" in lines[4]
    assert "cut" not in stage_table(costs, [0, 4, 12])


def test_halves_of_layers_that_share_a_selection() -> None:
    """A stage may begin with the mlp of any layer, where the next attention selects for itself."""
    config = config_of(4)
    config.indexer_types = ["full", "shared"] * 2
    costs = in_halves(costs_of([1.0] * 4), [0.5] * 4)
    # Unit 3 is the mlp of layer 1, before layer 2, which selects; unit 1 that of layer 0, before one that shares.
    assert partition("fast", config=config, num_stages=3, costs=costs)[1:-1] in ([3, 4], [4, 7], [3, 7])
    check_split(config, spans_of([0, 3, 8], in_halves=True)[1])
    check_split(config, spans_of([0, 7, 8], in_halves=True)[1])
    with pytest.raises(UserError, match="cannot start with layer 1"):
        check_split(config, spans_of([0, 1, 8], in_halves=True)[1])


def test_cuts_that_are_not_offered() -> None:
    check_cuts()
    with pytest.raises(UserError, match="--emb_partitions 2"):
        check_cuts(emb_partitions=2)


@pytest.mark.parametrize("options", [{"emb_partitions": 2}, {"emb_partitions": 0}])
def test_cuts_that_are_not_offered_are_options(options: dict[str, Any], tmp_path: Path) -> None:
    given: dict[str, Any] = {"model": tmp_path, "train_data": (str(tmp_path),)}
    TrainConfig(**given, emb_partitions=1)
    with pytest.raises(UserError, match=f"--{next(iter(options))}.*leave it out"):
        TrainConfig(**given, **options)


def test_many_half_layers_are_split_soon() -> None:
    """80 layers in 16 stages: what every stage could have is summed once, and what is too long is not looked at."""
    layers = costs_of([1.0 + number % 3 for number in range(160)])
    costs = replace(layers, in_halves=True)
    start = time.monotonic()
    bounds = partition("mem", config=config_of(80), num_stages=16, micro_batches=64, costs=costs)
    assert time.monotonic() - start < 5
    assert (bounds[0], bounds[-1], len(bounds)) == (0, 160, 17)
