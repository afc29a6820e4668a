"""Measured times: they see what costs more, are kept, and drive the split; a broken cache is no obstacle."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from jllm.errors import UserError
from jllm.guards import caches
from jllm.models.pipeline import timing
from jllm.models.pipeline.costs import Costs, estimate_costs
from jllm.models.pipeline.partition import partition
from jllm.models.pipeline.span import StageSpan
from tests.models.chain import token_objective
from tests.models.tiny import tiny_config

torch.set_num_threads(1)
OPTIONS: dict[str, Any] = {"sequence_length": 32, "dtype": torch.float32}
TIMED: dict[str, Any] = {**OPTIONS, "objective": token_objective}


def costs_of(family: str, **overrides: Any) -> tuple[Any, Costs]:
    config = tiny_config(family, **overrides)
    return config, estimate_costs(config, **OPTIONS)


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> list[StageSpan]:
    """The spans that are timed; none where times come from the cache."""
    timed: list[StageSpan] = []
    real = timing._time_stage

    def count(stage: Any, *rest: Any) -> Any:
        timed.append(stage.span)
        return real(stage, *rest)

    monkeypatch.setattr(timing, "_time_stage", count)
    return timed


def test_measured_split(tmp_path: Path) -> None:
    config, costs = costs_of("llama", num_hidden_layers=8, vocab_size=30_000)
    measured = timing.measure_costs(config, costs, **TIMED, cache=tmp_path)
    assert measured.is_measured
    assert measured.head_time > measured.layers[0].time > 0
    bounds = partition("profile", config=config, num_stages=2, costs=measured)
    assert bounds[1] > 4


def test_cache(tmp_path: Path, spans: list[StageSpan]) -> None:
    config, costs = costs_of("llama")
    state = torch.get_rng_state()
    first = timing.measure_costs(config, costs, **TIMED, cache=tmp_path / "new")
    assert [(span.first_layer, span.end_layer) for span in spans] == [(0, 1), (1, 2), (3, 4)]
    assert torch.equal(torch.get_rng_state(), state), "measuring drew from the run's random numbers"
    spans.clear()
    assert timing.measure_costs(config, costs, **TIMED, cache=tmp_path / "new") == first
    assert not spans
    [stored] = (tmp_path / "new").iterdir()
    for changed in ({"sequence_length": 16}, {"micro_batch_size": 2}, {"checkpoint_interval": 1}):
        timing.measure_costs(config, costs, **{**TIMED, **changed}, cache=tmp_path / "new")
        assert spans, f"{changed} read the times of something else"
        spans.clear()
    kept = json.loads(caches.read(stored) or b"")
    for damage in (
        "{",
        "[]",
        json.dumps({**kept, "layers": kept["layers"][1:]}),
        json.dumps({**kept, "layers": [0.0] * 4}),
        json.dumps({**kept, "head": "slow"}),
        json.dumps({**kept, "head": float("nan")}),
        json.dumps({**kept, "about": "something else"}),
    ):
        caches.write(stored, damage.encode())
        assert timing.measure_costs(config, costs, **TIMED, cache=tmp_path / "new").is_measured
        assert spans, f"{damage} was taken for times"
        spans.clear()
        assert len(json.loads(caches.read(stored) or b"")["layers"]) == 4


def test_halves_of_layers(tmp_path: Path, spans: list[StageSpan], monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer costs what it costs whole, in two parts; those are timed where it lies between others."""
    config = tiny_config("llama")
    timed = timing._time_stage

    def slow(stage: Any, *rest: Any) -> Any:
        # By so much that it is the longer half, however busy the machine is.
        seconds, shape = timed(stage, *rest)
        return seconds + 100.0 * stage.span.starts_inside, shape

    monkeypatch.setattr(timing, "_time_stage", slow)
    costs = estimate_costs(config, in_halves=True, **OPTIONS)
    measured = timing.measure_costs(config, costs, **TIMED, cache=tmp_path)
    inside = [(span.first_layer, span.starts_inside, span.ends_inside) for span in spans]
    assert inside == [(0, False, False), (1, False, False), (1, False, True), (1, True, False), (3, False, False)]
    assert [half.time for half in measured.layers[:2]] == [half.time for half in measured.layers[2:4]]
    assert 0 < measured.layers[0].time < measured.layers[1].time
    assert len(partition("profile", config=config, num_stages=8, costs=measured)) == 9
    spans.clear()
    assert timing.measure_costs(config, costs, **TIMED, cache=tmp_path) == measured
    assert not spans
    timing.measure_costs(config, costs.of_layers(), **TIMED, cache=tmp_path)
    assert spans, "layers read the times of halves"


def test_stages_are_timed_as_the_run_has_them(tmp_path: Path, spans: list[StageSpan]) -> None:
    """What the run does to its stages is done to these, and their times are kept apart."""
    config, costs = costs_of("llama")
    timing.measure_costs(config, costs, **TIMED, cache=tmp_path)
    spans.clear()
    seen: list[StageSpan] = []
    more: dict[str, Any] = {"prepare": lambda model, span: seen.append(span), "prepared": "tensorwise"}
    timing.measure_costs(config, costs, **TIMED, **more, cache=tmp_path)
    assert seen == spans != []


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config, costs = costs_of("llama")
    assert timing.measure_costs(config, costs, **TIMED, cache=tmp_path / "file").is_measured


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("deepseek_v3", {}),  # the first layer is of a kind of its own
        ("gemma2", {"checkpoint_interval": 2}),  # two kinds in turn
        ("qwen3_next", {"checkpoint_attention": True}),  # layers without attention
    ],
)
def test_layers_of_several_kinds(family: str, more: dict[str, Any], spans: list[StageSpan]) -> None:
    config, costs = costs_of(family)
    measured = timing.measure_costs(config, costs, **TIMED, **more)
    assert all(layer.time > 0 for layer in measured.layers)
    kinds = {(layer.kind, layer.parameters) for layer in costs.layers}
    alone = {(layer.kind, layer.parameters) for layer in costs.layers[1:-1]}
    assert len(kinds) > 1
    assert len(spans) == len(alone) + 2


def test_what_cannot_be_split_is_not_measured() -> None:
    config = tiny_config("hrm_text")
    with pytest.raises(UserError, match="over and over"):
        timing.measure_costs(config, estimate_costs(config, is_whole=True), **TIMED)
