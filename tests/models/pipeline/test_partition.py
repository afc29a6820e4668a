"""Partitions: boundaries are sound for any request, the searched ones are the best there are, mistakes are one line."""

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from jllm.errors import UserError
from jllm.models.families import check_split
from jllm.models.pipeline.carving import stage_class
from jllm.models.pipeline.costs import (
    Costs,
    LayerCost,
    Parameters,
    StateBytes,
    estimate_costs,
    state_bytes,
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
from jllm.models.trainable import ParameterChoice, select_trainable
from jllm.models.weights.source import causal_class
from jllm.train.config import TrainConfig
from tests.models.tiny import tiny_config


def config_of(layers: int, vocab: int = 64) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab, hidden_size=16, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2
    )


EMBEDDINGS = {"gpt2": "wte", "camembert": "word_embeddings"}


def all_of(count: int) -> Parameters:
    return Parameters(total=count, trained=count)


def costs_of(times: list[float], *, head: float = 0.0, activation: float = 1.0, tied: bool = False) -> Costs:
    return Costs(
        layers=tuple(
            LayerCost(kind="Layer", parameters=all_of(int(10 * t)), time=t, activation_bytes=activation * t)
            for t in times
        ),
        embedding_parameters=all_of(7),
        head_parameters=all_of(7),
        embedding_time=0.0,
        head_time=head,
        embedding_activation_bytes=0.0,
        head_activation_bytes=head,
        boundary_bytes=1.0,
        transient_bytes=0.0,
        state=StateBytes(trained=1.0, frozen=0.25),
        operations=0.0,
        tied_parameters=all_of(7 if tied else 0),
    )


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


def test_memory_counts_what_trains_and_who_shares_the_state() -> None:
    """Bytes a parameter: weight, gradient and its sum, and a rank's share of master weight and moments."""
    assert state_bytes(torch.bfloat16, sharded_over=1) == StateBytes(trained=2 + 2 + 4 + 4 + 8, frozen=2)
    assert state_bytes(torch.bfloat16, sharded_over=4) == StateBytes(trained=2 + 2 + 4 + 12 / 4, frozen=2)
    assert state_bytes(torch.bfloat16, moments=0, sharded_over=4) == StateBytes(trained=2 + 2 + 4 + 4 / 4, frozen=2)
    assert state_bytes(torch.float32) == StateBytes(trained=4 + 4 + 8, frozen=4)
    config = config_of(4)
    state = StateBytes(trained=100.0, frozen=1.0)
    whole = estimate_costs(config, state=state, sequence_length=1)
    some = estimate_costs(
        config, state=state, sequence_length=1, selection=ParameterChoice(frozen_modules="mlp,embed_tokens")
    )
    mlp = 3 * 16 * 32
    assert whole.parameters(0, 2) == all_of(some.parameters(0, 2).total)
    assert some.parameters(0, 2).trained == whole.parameters(0, 2).total - 2 * mlp - 64 * 16
    assert whole.memory(0, 2, in_flight=1) - some.memory(0, 2, in_flight=1) == 99 * (2 * mlp + 64 * 16)
    assert "train" in stage_table(some, [0, 2, 4]).splitlines()[1]
    kept = estimate_costs(config, checkpoint_interval=1)
    offloaded = estimate_costs(config, checkpoint_interval=1, checkpoint_offload=True)
    saved = kept.memory(0, 2, in_flight=3) - offloaded.memory(0, 2, in_flight=3)
    assert saved == 3 * 2 * 2048 * 16 * 2  # in flight, layers, tokens, hidden size, bf16


@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize(
    ("family", "boundaries"),
    # A head that is registered before the embedding; the others have two stages as well.
    [("camembert", [0, 4])]
    + [(family, at) for family in ("gpt2", "gemma3_text", "gemma4_text", "llama") for at in ([0, 4], [0, 2, 4])],
)
def test_parameters_are_those_of_the_stages(family: str, boundaries: list[int], is_frozen: bool) -> None:
    """Learned positions beside a tied embedding, layers with configurations of their own."""
    config = tiny_config(family)
    selection = ParameterChoice(frozen_modules=EMBEDDINGS.get(family, "embed_tokens") if is_frozen else None)
    costs = estimate_costs(config, sequence_length=16, selection=selection)
    for span in spans_of(boundaries):
        with torch.device("meta"):
            model = stage_class(causal_class(config), span)._from_config(copy.deepcopy(config))
        selected = select_trainable(model, span, selection)
        found = costs.parameters(span.first_layer, span.end_layer)
        assert found == Parameters(total=selected.total, trained=selected.trainable)


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
