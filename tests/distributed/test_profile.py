"""`--partition_method profile`: one process measures, all processes split alike, and a dry run shows that split."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jllm.guards import caches
from tests.distributed.ranks import Ranks
from tests.distributed.runs import options_of, records, train_rank
from tests.fixtures import random_rows, tiny_llama, write_rows

PROFILED = {"partition_method": "profile", "max_steps": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("profile")
    tiny_llama(folder / "model", tied=True)
    write_rows(folder / "data", random_rows(8))
    return folder


def with_cache(cache: Path, function: Callable[[], Any]) -> Any:
    """Call `function` with times kept in `cache`, on a rank that other tests use too."""
    from jllm.train import setup

    kept, setup.default_cache = setup.default_cache, lambda: cache
    try:
        return function()
    finally:
        setup.default_cache = kept


def train_with_cache(options: dict[str, Any], cache: Path) -> str | None:
    answer: str | None = with_cache(cache, lambda: train_rank(options))
    return answer


def plan_rank(options: dict[str, Any], cache: Path) -> list[int]:
    """The boundaries of a rank; ranks other than 0 cannot measure."""
    from jllm.train import setup
    from jllm.train.config import TrainConfig
    from jllm.train.distributed import launch
    from jllm.train.distributed.agreement import Agreement
    from jllm.train.shape import resolve_shape

    config = TrainConfig(**options)
    launch.join(config.timeout)
    shape = resolve_shape(config, launch.world_size())
    measure = setup.measure_costs
    if launch.rank() != 0:
        setup.measure_costs = None  # type: ignore[assignment]
    try:
        family, agreement = setup.find_family(config), Agreement(shape.mesh)
        plan = with_cache(cache, lambda: setup.plan_stages(config, shape, family, agreement))
    finally:
        setup.measure_costs = measure
    return [0, *(span.end_layer for span in plan.spans)]


def test_one_process_measures_and_all_split_alike(ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first, second = ranks(2).run(plan_rank, options_of(folder, PROFILED), cache)
    assert first == second
    assert first[0] == 0
    assert first[-1] == 4
    [stored] = cache.iterdir()
    times = json.loads(caches.read(stored) or b"")
    for costly, boundaries in ((0, [0, 1, 4]), (3, [0, 3, 4])):
        layers = [100.0 if index == costly else 1.0 for index in range(4)]
        caches.write(stored, json.dumps({**times, "layers": layers, "embedding": 0.0, "head": 0.0}).encode())
        assert ranks(2).run(plan_rank, options_of(folder, PROFILED), cache) == [boundaries] * 2
    stored.write_text("{")
    first, second = ranks(2).run(plan_rank, options_of(folder, PROFILED), cache)
    assert first == second


def test_a_run_trains_on_measured_stages(ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path) -> None:
    losses = {}
    for method in ("profile", "uniform"):
        log = tmp_path / method
        options = options_of(folder, PROFILED, partition_method=method, log_dir=log)
        assert ranks(2).run(train_with_cache, options, tmp_path / "cache") == [None] * 2
        losses[method] = [record["loss"] for record in records(log)]
    assert losses["profile"] == pytest.approx(losses["uniform"], abs=1e-6)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_dry_run_shows_the_measured_split(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from jllm.train.config import TrainConfig
    from jllm.train.dry_run import dry_run

    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # dry_run would set this process's threads otherwise
    config = TrainConfig(**options_of(folder, PROFILED))
    with_cache(tmp_path, lambda: dry_run(config))
    assert "time measured" in capsys.readouterr().out
    [stored] = tmp_path.iterdir()
    times = json.loads(caches.read(stored) or b"")
    caches.write(
        stored, json.dumps({**times, "layers": [1.0, 1.0, 1.0, 100.0], "embedding": 0.0, "head": 0.0}).encode()
    )
    with_cache(tmp_path, lambda: dry_run(config))
    assert "0-2 (3)" in capsys.readouterr().out


def test_one_stage_measures_nothing(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from jllm.train.config import TrainConfig
    from jllm.train.dry_run import dry_run

    with_cache(tmp_path, lambda: dry_run(TrainConfig(**options_of(folder, PROFILED, pipe_parallel_size=1))))
    assert "0-3 (4)" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
