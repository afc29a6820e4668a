"""What a run is told about its shape: every option and value that is named does help, and nothing is named in vain."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jllm.errors import UserError
from jllm.models.pipeline.partition import bubble_share, fullest_stage, imbalance, partition
from jllm.train.advice import (
    LARGE_BUBBLE,
    LARGE_IMBALANCE,
    PipelineAdvice,
    filling_lines,
    micro_batches_needed,
)
from jllm.train.config import TrainConfig
from jllm.train.data.batching import EpochSteps, Filling
from jllm.train.shape import resolve_shape
from tests.models.pipeline.by_hand import config_of, costs_of


def options_of(**options: Any) -> TrainConfig:
    return TrainConfig(model=Path("model"), train_data=("data",), **options)


def advised(
    times: list[float], world_size: int, *, head: float = 0.0, memory_limit: float | None = None, **options: Any
) -> tuple[str, ...]:
    """The warnings of a run on layers that take so long."""
    config, family, costs = options_of(**options), config_of(len(times)), costs_of(times, head=head)
    shape = resolve_shape(config, world_size)
    boundaries = partition(
        config.partition_method,
        config=family,
        num_stages=shape.mesh.pipe,
        micro_batches=shape.accumulation,
        costs=costs,
    )
    return PipelineAdvice(config, shape, family, costs, boundaries, memory_limit=memory_limit).warnings()


def ways(line: str) -> list[dict[str, Any]]:
    """The options of each way that a warning names."""
    given = line.partition("; give ")[2]
    found = []
    for way in re.split(r", or (?=--)", given):
        words = re.findall(r"--(\w+) (\S+)", way) + [("processes", n) for n in re.findall(r" on (\d+) processes", way)]
        found.append({name: int(value) if value.isdecimal() else value for name, value in words})
    return [way for way in found if way]


@settings(max_examples=150, deadline=None)
@given(
    times=st.lists(st.floats(0.1, 10), min_size=1, max_size=10),
    head=st.floats(0, 30),
    pipe=st.integers(1, 6),
    data=st.sampled_from([1, 2, 6]),
    micro_batch=st.integers(1, 6),
    accumulation=st.integers(1, 12),
    method=st.sampled_from(["fast", "uniform", "parameters", "mem"]),
    whole=st.booleans(),
)
def test_what_is_advised_helps(
    times: list[float],
    head: float,
    pipe: int,
    data: int,
    micro_batch: int,
    accumulation: int,
    method: str,
    whole: bool,
) -> None:
    pipe = min(pipe, len(times))
    options: dict[str, Any] = {
        "pipe_parallel_size": pipe,
        "per_device_train_batch_size": micro_batch,
        "partition_method": method,
    }
    if whole:
        options["global_batch_size"] = micro_batch * accumulation * data
    else:
        options["gradient_accumulation_steps"] = accumulation
    lines = advised(times, pipe * data, head=head, **options)
    family, costs = config_of(len(times)), costs_of(times, head=head)

    def measures(**changed: Any) -> tuple[float, float]:
        config = options_of(**{**options, **changed})
        shape = resolve_shape(config, config.processes or pipe * data)
        stages, name = shape.mesh.pipe, config.partition_method
        bounds = partition(name, config=family, num_stages=stages, micro_batches=shape.accumulation, costs=costs)
        return imbalance(costs, bounds), bubble_share(stages, shape.accumulation)

    over, bubble = measures()
    uneven = [line for line in lines if "slowest" in line]
    bubbly = [line for line in lines if "bubble" in line]
    assert len(uneven) == (over > LARGE_IMBALANCE)
    assert len(bubbly) == (bubble > LARGE_BUBBLE)
    for line in uneven:
        assert f"{over:.0%} longer" in line
        assert ways(line)
        for way in ways(line):
            better, _ = measures(**way)
            assert better < over
            assert better <= LARGE_IMBALANCE or "pipe_parallel_size" not in way
    for line in bubbly:
        assert ways(line)
        for way in ways(line):
            # A step keeps its rows where that is said.
            _, less = measures(**way)
            assert less <= LARGE_BUBBLE


def test_lines_as_people_see_them() -> None:
    layers = [1.0] * 8
    assert advised(layers, 1) == ()
    assert advised(layers, 4, pipe_parallel_size=4, gradient_accumulation_steps=9) == ()
    assert advised(layers, 4, pipe_parallel_size=4, gradient_accumulation_steps=8) == (
        "warning: a step of 8 micro-batches in 4 stages is 27% bubble, in which stages wait for the pipeline to fill"
        " and drain; give --gradient_accumulation_steps 9 (25%, a step has 9 rows), or --pipe_parallel_size 2 (11%)",
    )
    assert advised(layers, 2, pipe_parallel_size=2, per_device_train_batch_size=4) == (
        "warning: a step of 1 micro-batches in 2 stages is 50% bubble, in which stages wait for the pipeline to fill"
        " and drain; give --per_device_train_batch_size 1 --gradient_accumulation_steps 4 (20%, a step has the same"
        " rows), or --gradient_accumulation_steps 3 (25%, a step has 12 rows), or --pipe_parallel_size 1 (0%)",
    )
    uneven = {"pipe_parallel_size": 2, "gradient_accumulation_steps": 8, "partition_method": "7,1"}
    assert advised(layers, 2, **uneven) == (
        "warning: the slowest of 2 stages takes 75% longer than the mean, and the others wait for it; give"
        " --partition_method fast (0% over the mean), or --pipe_parallel_size 1 --partition_method fast (no pipeline)",
    )


def test_a_head_that_is_slower_than_all_layers_asks_for_fewer_stages() -> None:
    [line] = advised([1.0] * 8, 8, head=10.0, pipe_parallel_size=8, gradient_accumulation_steps=64)
    assert line.endswith("; give --pipe_parallel_size 2 (22% over the mean)")


def test_what_does_not_fit_is_not_named() -> None:
    options: dict[str, Any] = {"pipe_parallel_size": 4, "gradient_accumulation_steps": 3}
    costs, family = costs_of([1.0] * 8), config_of(8)
    two = partition("fast", config=family, num_stages=2, micro_batches=3, costs=costs)
    needed = fullest_stage(costs, two, micro_batches=3)
    [line] = advised([1.0] * 8, 4, memory_limit=needed, **options)
    assert "--pipe_parallel_size 2 (25%)" in line
    [line] = advised([1.0] * 8, 4, memory_limit=needed - 1, **options)
    assert "--pipe_parallel_size" not in line
    assert "--gradient_accumulation_steps 9" in line
    [line] = advised([10.0, 0.1], 2, memory_limit=0.0, pipe_parallel_size=2, gradient_accumulation_steps=3)
    assert line.endswith("; no split of this model with these processes is better")


@given(stages=st.integers(1, 200))
def test_the_fewest_micro_batches(stages: int) -> None:
    needed = micro_batches_needed(stages)
    assert bubble_share(stages, needed) <= LARGE_BUBBLE
    assert needed == 1 or bubble_share(stages, needed - 1) > LARGE_BUBBLE


@pytest.mark.parametrize(
    ("filled", "larger", "block_mask", "said"),
    [
        (0.9, None, False, "micro-batches of 2,048 tokens are 90% full, 1% of them less than half"),
        (
            0.46,
            8192,
            False,
            "warning: micro-batches of 2,048 tokens are 46% full, 1% of them less than half; give"
            " --batch_size_tokens 8192, or --block_mask, with which rows are joined (documents then do not attend to"
            " each other)",
        ),
        (
            0.46,
            4096,
            True,
            "warning: micro-batches of 2,048 tokens are 46% full, 1% of them less than half; give"
            " --batch_size_tokens 4096",
        ),
    ],
)
def test_filling(filled: float, larger: int | None, block_mask: bool, said: str) -> None:
    config = options_of(batch_size_tokens=2048, block_mask=block_mask)
    filling = Filling(steps=3, filled=filled, half_empty=0.01)
    assert filling_lines(config, EpochSteps(counts=(3,), filling=filling, larger=larger)) == [said]
    assert filling_lines(config, EpochSteps(counts=(3,))) == []


def test_processes_that_do_not_divide_are_not_advised() -> None:
    """Every number of stages that is named divides the processes of the run."""
    for pipe in (3, 5, 6):
        for line in advised([1.0] * 12, pipe * 2, pipe_parallel_size=pipe):
            for way in ways(line):
                try:
                    resolve_shape(options_of(**{"pipe_parallel_size": pipe, **way}), way.get("processes", pipe * 2))
                except UserError as error:
                    raise AssertionError(f"{way}: {error}") from None
