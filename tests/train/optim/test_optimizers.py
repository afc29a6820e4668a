"""Which parameters are treated alike, and what the options refuse."""

from pathlib import Path
from typing import Any

import pytest

from jllm.errors import UserError
from jllm.models.pipeline.span import spans_of
from jllm.models.pipeline.stage import PipelineStage
from jllm.models.weights.loading import load_stage
from jllm.train.config import TrainConfig
from jllm.train.optim.optimizers import KINDS, NAMES, build_optimizer
from jllm.train.optim.schedules import RATE_FACTOR, set_learning_rate
from jllm.train.options.optimizer import OPTIMIZERS
from tests.fixtures import tiny_llama
from tests.models.chain import token_objective


@pytest.fixture
def stage(tmp_path: Path) -> PipelineStage:
    import torch

    [span] = spans_of([0, 4])
    model = load_stage(tiny_llama(tmp_path / "model", tied=False), span, dtype=torch.float32)
    return PipelineStage(model, span, token_objective)


def config(**more: Any) -> TrainConfig:
    return TrainConfig(model=Path("model"), train_data=("data",), **more)


def test_every_optimizer_says_what_it_keeps() -> None:
    assert set(KINDS) == set(OPTIMIZERS)


def test_matrices_are_decayed(stage: PipelineStage) -> None:
    optimizer = build_optimizer(stage, config(weight_decay=0.1))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert all(p.ndim >= 2 for p in optimizer.param_groups[0]["params"])
    assert all(p.ndim < 2 for p in optimizer.param_groups[1]["params"])
    assert sum(len(group[NAMES]) for group in optimizer.param_groups) == len(list(stage.parameters()))


def test_muon_leaves_embedding_and_head_to_adamw(stage: PipelineStage) -> None:
    groups = build_optimizer(stage, config(optimizer="muon")).param_groups
    names = {name for group in groups if group["is_matrix"] for name in group[NAMES]}
    assert "model.layers.0.mlp.up_proj.weight" in names
    assert not names & {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"}


def test_rates_of_modules_follow_the_schedule(stage: PipelineStage) -> None:
    given = config(learning_rate=1e-3, module_learning_rate=("embed_tokens=1e-4", "layers.[01]..*=0"))
    optimizer = build_optimizer(stage, given)
    set_learning_rate(optimizer, 1e-3 / 2)
    rates = {name: group["lr"] for group in optimizer.param_groups for name in group[NAMES]}
    assert rates["model.embed_tokens.weight"] == pytest.approx(1e-4 / 2)
    assert rates["model.layers.1.mlp.up_proj.weight"] == 0
    assert rates["model.layers.2.mlp.up_proj.weight"] == 1e-3 / 2
    assert {group[RATE_FACTOR] for group in optimizer.param_groups} == {0.1, 0.0, 1.0}


def test_a_pattern_that_matches_nothing(stage: PipelineStage) -> None:
    with pytest.raises(UserError, match="--module_learning_rate 'embedding' matches no module"):
        build_optimizer(stage, config(module_learning_rate=("embedding=1",)))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"module_learning_rate": ("mlp",)}, "--module_learning_rate 'mlp': give a pattern and a rate"),
        ({"module_learning_rate": ("mlp=-1",)}, "--module_learning_rate 'mlp=-1': give a pattern and a rate"),
        ({"module_learning_rate": ("mlp=1",), "learning_rate": 0.0}, "--module_learning_rate needs a --learning_rate"),
        ({"optimizer": "schedule_free"}, "--optimizer schedule_free averages instead of decaying"),
        ({"optimizer": "muon", "precision": "fp16"}, "--optimizer muon has no fp32 masters"),
        ({"optimizer": "adamw_8bit", "zero_stage": 1}, "--zero_stage 1 with --optimizer adamw_8bit"),
        ({"lr_scheduler_type": "rms_ratio", "num_warmup_steps": 5.0}, "--num_warmup_steps 5: --lr_scheduler_type rms"),
    ],
)
def test_mistakes(more: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refused:
        config(**more)
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize(("optimizer", "share"), [("adamw_kahan", 1.0), ("adamw_8bit", 0.0)])
def test_small_updates_of_bf16_weights(stage: PipelineStage, optimizer: str, share: float) -> None:
    """1,000 updates of 1e-6 move a weight of 0.1 as far as fp32 does, or, where rounding loses them, not at all."""
    import torch

    pytest.importorskip({"adamw_kahan": "optimi", "adamw_8bit": "bitsandbytes"}[optimizer])
    stage.to(torch.bfloat16)
    weight = stage.model.get_parameter("model.layers.0.mlp.up_proj.weight")
    with torch.no_grad():
        weight.fill_(0.1)
    for parameter in stage.parameters():
        parameter.requires_grad_(parameter is weight)
    begun = weight.detach().float().clone()
    made = build_optimizer(stage, config(optimizer=optimizer, learning_rate=1e-6, weight_decay=0.0))
    for _ in range(1000):
        weight.grad = torch.ones_like(weight)
        made.step()
    moved = (begun - weight.detach().float()).mean()
    assert float(moved) == pytest.approx(share * 1e-3, rel=0.04)
