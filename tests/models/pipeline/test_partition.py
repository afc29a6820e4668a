"""Partitions: boundaries are sound for any request, the searched ones are the best there are, mistakes are one line."""

import itertools
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
    with pytest.raises(UserError, match="give boundaries among 3, 6, 9"):
        check_split(config, spans_of([0, 6, 8, 12])[2])
    # Five stages do not fit: what is found cannot be cut, and `check_split` says so.
    five = partition("fast", config=config, num_stages=5)
    assert len(five) == 6
    assert not set(five[1:-1]) <= {3, 6, 9}


def test_cuts_that_are_not_offered() -> None:
    check_cuts()
    with pytest.raises(UserError, match="half layers would"):
        check_cuts(split_dlayer=True)
    with pytest.raises(UserError, match="--emb_partitions 2"):
        check_cuts(emb_partitions=2)


@pytest.mark.parametrize("options", [{"split_dlayer": True}, {"emb_partitions": 2}, {"emb_partitions": 0}])
def test_cuts_that_are_not_offered_are_options(options: dict[str, Any], tmp_path: Path) -> None:
    given = {"model": tmp_path, "train_data": (str(tmp_path),)}
    TrainConfig(**given, split_dlayer=False, emb_partitions=1)
    with pytest.raises(UserError, match=f"--{next(iter(options))}.*leave it out"):
        TrainConfig(**given, **options)
