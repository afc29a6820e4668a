"""Muon's updates: the formula's in fp32, torch's own in bf16."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from jllm.train.optim.muon import TypedMuon

RATE, DECAY, STEPS = 1e-2, 0.1, 4
SHAPES = [(6, 6), (3, 40), (40, 3), (1, 5), (64, 48)]


def reference(weight: NDArray[np.float64], gradients: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Weights after some updates, written out."""
    average = np.zeros_like(weight)
    for gradient in gradients:
        average = 0.95 * average + 0.05 * gradient
        found = 0.05 * gradient + 0.95 * average
        found = found / max(np.linalg.norm(found), 1e-7)
        for _ in range(5):
            square = found @ found.T
            found = 3.4445 * found + (-4.7750 * square + 2.0315 * square @ square) @ found
        weight = weight * (1 - RATE * DECAY) - RATE * 0.2 * max(weight.shape) ** 0.5 * found
    return weight


def inputs(shape: tuple[int, int]) -> tuple[NDArray[np.float64], list[NDArray[np.float64]]]:
    random = np.random.default_rng(shape[0])
    return random.normal(size=shape), [random.normal(size=shape) for _ in range(STEPS)]


def updated(kind: type[torch.optim.Muon], shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    begun, gradients = inputs(shape)
    weight = torch.nn.Parameter(torch.from_numpy(begun).to(dtype))
    groups = [{"params": [weight], "weight_decay": DECAY}]
    more = {"adjust_lr_fn": "match_rms_adamw"} if kind is torch.optim.Muon else {}
    optimizer = kind(groups, lr=RATE, **more)  # type: ignore[arg-type]
    for gradient in gradients:
        weight.grad = torch.from_numpy(gradient).to(dtype)
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("shape", SHAPES)
def test_fp32_follows_the_formula(shape: tuple[int, int]) -> None:
    found = updated(TypedMuon, shape, torch.float32).numpy()
    np.testing.assert_allclose(found, reference(*inputs(shape)), atol=2e-6, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_is_torchs_own(shape: tuple[int, int]) -> None:
    assert torch.equal(*(updated(kind, shape, torch.bfloat16) for kind in (TypedMuon, torch.optim.Muon)))


def test_fp32_is_torchs_own_to_bf16() -> None:
    """Momentum, decay and rate are the same; what differs is the type of the iteration."""
    ours, torchs = (updated(kind, (64, 48), torch.float32) for kind in (TypedMuon, torch.optim.Muon))
    assert 1e-6 < float((ours - torchs).abs().max()) < 1e-3


def test_weights_without_a_gradient_stay_as_they_are() -> None:
    weights = [torch.nn.Parameter(torch.eye(3)) for _ in range(2)]
    optimizer = TypedMuon([{"params": weights}], lr=RATE)
    weights[0].grad = torch.ones(3, 3)
    optimizer.step()
    assert torch.equal(weights[1].detach(), torch.eye(3))
    assert not torch.equal(weights[0].detach(), torch.eye(3))
    assert weights[1] not in optimizer.state
