"""What is attached to a loaded stage trains, in real runs of two stages as in one process; the base may be frozen."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import Ranks
from tests.distributed.runs import options_of
from tests.fixtures import random_rows, tiny_llama, write_rows

ALL_OF_THE_BASE = r".*_proj,.*norm,embed_tokens,lm_head"


def train_with_adapters(options: dict[str, Any], layers: tuple[int, ...]) -> dict[str, tuple[Any, Any]]:
    """One rank of a run whose stages get adapters when things are attached: values before and after, by name."""
    from jllm.models.pipeline.carving import published_names
    from jllm.train import setup, trainer
    from jllm.train.config import TrainConfig
    from jllm.train.distributed import launch
    from jllm.train.distributed.agreement import Agreement
    from jllm.train.shape import resolve_shape
    from tests.models.small_adapter import attach_adapters

    plain = setup.attach

    def attach(model: Any, span: Any, config: TrainConfig, **more: Any) -> Any:
        attach_adapters(model, span, layers)
        return plain(model, span, config, **more)

    setup.attach = attach
    config = TrainConfig(**options)
    shape = resolve_shape(config, launch.world_size())
    launch.join(config.timeout)
    run = trainer.TrainingRun(config, shape, Agreement(shape.mesh), setup.read_model_info(config), run="r")
    names = published_names(run.stage.model, run.stage.span)
    values = {names[name]: parameter for name, parameter in run.stage.model.named_parameters()}
    before = {name: parameter.detach().float().numpy().copy() for name, parameter in values.items()}
    run.train()
    return {name: (before[name], parameter.detach().float().numpy()) for name, parameter in values.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_llama(tmp_path / "model", tied=False)
    write_rows(tmp_path / "data", random_rows(12, labels=True), files=2)
    return tmp_path


@pytest.mark.parametrize(
    ("layers", "frozen", "precision"),
    [
        ((0, 3), None, "fp32"),
        ((0, 3), ALL_OF_THE_BASE, "fp32"),
        ((0,), ALL_OF_THE_BASE, "fp32"),
        ((3,), ALL_OF_THE_BASE, "fp32"),
        ((3,), ALL_OF_THE_BASE, "bf16"),
    ],
)
def test_adapters_train(
    ranks: Callable[[int], Ranks], folder: Path, layers: tuple[int, ...], frozen: str | None, precision: str
) -> None:
    """Where only one stage has an adapter and the base is frozen, the other one has nothing to train."""
    import numpy as np

    found = {}
    for stages in (1, 2):
        more = {
            "pipe_parallel_size": stages,
            "partition_method": "uniform",
            "precision": precision,
            "optimizer": "sgd",
            "learning_rate": 0.1,
            "gradient_accumulation_steps": 2,
            "max_steps": 3,
            "lr_scheduler_type": "constant",
            "frozen_modules": frozen,
            "log_dir": folder / f"log-{stages}",
        }
        answers = ranks(stages).run(train_with_adapters, options_of(folder, **more), layers)
        found[stages] = {name: pair for answer in answers for name, pair in answer.items()}
    adapters = {f"model.layers.{index}.adapter.weight" for index in layers}
    assert found[1].keys() == found[2].keys() >= adapters
    for name, (before, after) in found[2].items():
        assert np.array_equal(before, after) != (frozen is None or name in adapters), name
        tolerance = 1e-5 if precision == "fp32" else 2e-2
        np.testing.assert_allclose(after, found[1][name][1], atol=tolerance, err_msg=name)
