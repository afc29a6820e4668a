"""The average of a schedule-free optimizer is there where it is asked for, and gone without a trace."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("schedulefree", reason="schedulefree is not installed: pip install .[optimizers]")

import schedulefree

from jllm.train.optim.averaged import average, averaged


def test_there_and_back() -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(5))
    optimizer = schedulefree.AdamWScheduleFree([weight], lr=0.1, betas=(0.9, 0.99))
    optimizer.train()
    points = [weight.detach().clone()]
    total = torch.zeros(5)
    for number in range(1, 6):
        weight.grad = torch.randn(5)
        optimizer.step()
        z = optimizer.state[weight]["z"]
        points.append(z.clone())
        total = total + z
        before = weight.detach().clone()
        with averaged(SimpleNamespace(optimizer=optimizer)):
            # With a constant rate the average is the plain mean of all points after the first.
            torch.testing.assert_close(weight.detach(), total / number, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(weight.detach(), average(before, z, 0.9), atol=1e-6, rtol=0)
        assert torch.equal(weight.detach(), before)
        assert optimizer.param_groups[0]["train_mode"]


def test_others_are_left_alone() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    with averaged(SimpleNamespace(optimizer=torch.optim.SGD([weight], lr=1.0))):
        assert weight.tolist() == [1, 1]
