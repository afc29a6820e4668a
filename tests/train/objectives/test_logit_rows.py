"""Whether a device has a kernel for rows of logits, and what happens where it cannot be made."""

import importlib.util
import logging

import pytest
import torch

from jllm.train.objectives import logit_rows


def test_other_devices_have_no_kernel() -> None:
    assert not logit_rows.has_kernel(torch.device("cpu"))


def test_a_kernel_that_cannot_be_made_is_told_and_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Here for want of a device; on machines with one for want of a compiler."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch, "ones", _without_compiler)
    logit_rows.has_kernel.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert not any(logit_rows.has_kernel(torch.device("cuda")) for _ in range(2))
    logit_rows.has_kernel.cache_clear()
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1
    assert told[0].startswith("the loss has no kernel here, and is slower: ")


def _without_compiler(*size: int, **options: object) -> torch.Tensor:
    raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")
