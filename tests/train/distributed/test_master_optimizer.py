"""Sums of gradients: what DeepSpeed's own optimizer adds up, without its copies."""

from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import nn

from jllm.train.distributed.master_optimizer import MasterOptimizer


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
