"""Sums of gradients: what DeepSpeed's own optimizer adds up, without its copies."""

import datetime
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import nn

from jllm.train.distributed.master_optimizer import MasterOptimizer
from tests.distributed.ranks import Ranks


def sums(kind: type[BF16_Optimizer], gradients: list[torch.Tensor]) -> tuple[torch.Tensor, nn.Parameter]:
    """What `kind` has after these gradients of one parameter, and the parameter."""
    parameter = nn.Parameter(torch.zeros_like(gradients[0]))
    total = torch.zeros(parameter.numel())
    optimizer = SimpleNamespace(
        immediate_grad_update=True,
        autoep_folding_tp_group=None,
        fp32_groups_gradients=[[total]],
        fp32_groups_has_gradients=[[False]],
    )
    for gradient in gradients:
        parameter.grad = gradient.clone()
        kind._update_hp_grad(optimizer, parameter, 0, 0, False)
    assert optimizer.fp32_groups_has_gradients == [[True]]
    return total, parameter


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4)])
def test_the_same_sums(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=generator).bfloat16() * 10.0**power for power in range(-3, 4)]
    with torch.no_grad():
        found, parameter = sums(MasterOptimizer, gradients)
        expected, _ = sums(BF16_Optimizer, gradients)
    assert torch.equal(found, expected)
    assert parameter._hp_grad is found  # type: ignore[attr-defined]
    assert not torch.equal(found, sum(gradients).float().flatten()), "sums in bf16 would be others"  # type: ignore[union-attr]


def test_a_parameter_without_a_gradient_adds_nothing() -> None:
    parameter, total = nn.Parameter(torch.zeros(3)), torch.zeros(3)
    optimizer = SimpleNamespace(
        immediate_grad_update=True, fp32_groups_gradients=[[total]], fp32_groups_has_gradients=[[False]]
    )
    MasterOptimizer._update_hp_grad(optimizer, parameter, 0, 0, False)  # type: ignore[arg-type]
    assert optimizer.fp32_groups_has_gradients == [[False]]
    assert not total.any()


def step_of_rank(kind: type[BF16_Optimizer]) -> tuple[float, list[float]]:
    """The norm and the weights after a step in which the second of two ranks alone has gradients of both parameters."""
    import deepspeed
    from deepspeed import comm

    deepspeed.init_distributed("gloo", timeout=datetime.timedelta(seconds=60))
    rank = comm.get_rank()
    parameters = [nn.Parameter(torch.zeros(4, dtype=torch.bfloat16)) for _ in range(2)]
    settings: Any = SimpleNamespace(enabled=True, immediate_grad_update=True)
    optimizer = kind(
        torch.optim.SGD(parameters, lr=1.0),
        {each: str(number) for number, each in enumerate(parameters)},
        settings,
        clip_grad=0.5,
        dp_process_group=comm.new_group([0, 1]),
        grad_acc_dtype=torch.float32,
    )
    sum((each * 3).sum() for each in parameters[: rank + 1]).backward()  # type: ignore[union-attr]
    for each in optimizer.non_expert_gradients:
        comm.all_reduce(each)
    optimizer.step()
    return float(optimizer._global_grad_norm), torch.cat([each.detach() for each in parameters]).tolist()


def test_a_gradient_that_one_rank_alone_has_counts_on_all() -> None:
    """As that of an expert to which no token of a rank's micro-batches went."""
    norm = (4 * 6**2 + 4 * 3**2) ** 0.5
    weights = torch.tensor([6.0] * 4 + [3.0] * 4) * -0.5 / norm
    for found, weights_found in Ranks(2).run(step_of_rank, MasterOptimizer):
        assert found == pytest.approx(norm)
        torch.testing.assert_close(torch.tensor(weights_found), weights, rtol=0.01, atol=0)
    norms = [found for found, _ in Ranks(2).run(step_of_rank, BF16_Optimizer)]
    assert norms[0] < norms[1], "DeepSpeed's own has a norm for each: this class is still needed"
