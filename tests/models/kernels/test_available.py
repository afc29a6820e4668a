"""Attention kernels: which are installed, which comes first, and that ways to call them compute the same."""

import importlib.metadata
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from jllm.models.kernels import available as kernels
from tests.models import varlen_on_cpu


@pytest.mark.parametrize("takes", [varlen_on_cpu.ENABLE_GQA, varlen_on_cpu.WITHOUT, frozenset({"is_causal"})])
@pytest.mark.parametrize("heads", [2, 4])
def test_by_lengths(monkeypatch: pytest.MonkeyPatch, takes: frozenset[str], heads: int) -> None:
    """Values may be narrower than keys; each document is as it is alone. Whatever the version calls its arguments."""

    def of_this_version(*given: Any, **options: Any) -> Tensor:
        assert options.keys() <= {*takes, "scale"}
        assert ("enable_gqa" in options) == (heads < 4 and "enable_gqa" in takes)
        return varlen_on_cpu.varlen_attn(*given, **options)

    monkeypatch.setattr(kernels, "varlen_attn", of_this_version)
    monkeypatch.setattr(kernels, "_VARLEN_TAKES", takes)
    query, key, value = torch.randn(12, 4, 8), torch.randn(12, heads, 8), torch.randn(12, heads, 6)
    bounds = torch.tensor([0, 5, 12], dtype=torch.int32)
    for window in (None,) if "is_causal" in takes else (None, 3):
        found = kernels.by_lengths(query, key, value, bounds, 7, 0.3, window)
        assert found.shape == (12, 4, 6)
        for part in (slice(0, 5), slice(5, 12)):
            q, k, v = (each[part].transpose(0, 1)[None] for each in (query, key, value))
            steps = torch.arange(q.shape[2])
            distance = steps[:, None] - steps
            seen = (distance >= 0) & (distance < (window or 100))
            alone = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=seen, scale=0.3, enable_gqa=True
            )
            torch.testing.assert_close(found[part], alone[0].transpose(0, 1), atol=1e-6, rtol=1e-5)
            if window is None:
                torch.testing.assert_close(kernels.causal(q, k, v, 0.3), alone, atol=1e-6, rtol=1e-5)


def test_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package flash-attn-4 brings the module of flash-attn, and is not taken for it."""
    there = {"flash-attn-4"}

    def version(name: str) -> str:
        if name not in there:
            raise importlib.metadata.PackageNotFoundError(name)
        return "4.0"

    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name == "flash_attn" else None)
    monkeypatch.setattr("importlib.metadata.version", version)
    assert [name for name in kernels.FLASH if kernels.is_installed(name)] == ["flash_attention_4"]
    there.add("flash-attn")
    assert [name for name in kernels.FLASH if kernels.is_installed(name)] == ["flash_attention_4", "flash_attention_2"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (8, 0))
    assert [name for name in kernels.FLASH if kernels.is_installed(name)] == ["flash_attention_2"]


@pytest.fixture
def order() -> Iterator[list[int]]:
    before = [int(each) for each in torch._C._get_sdp_priority_order()]
    yield before
    torch._C._set_sdp_priority_order(before)


def test_cudnn_first(monkeypatch: pytest.MonkeyPatch, order: list[int]) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (8, 9))
    kernels.prefer_cudnn()
    assert list(torch._C._get_sdp_priority_order()) == order
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    monkeypatch.setattr("torch.are_deterministic_algorithms_enabled", lambda: True)
    kernels.prefer_cudnn()
    assert list(torch._C._get_sdp_priority_order()) == order
    monkeypatch.setattr("torch.are_deterministic_algorithms_enabled", lambda: False)
    kernels.prefer_cudnn()
    cudnn = int(SDPBackend.CUDNN_ATTENTION)  # type: ignore[call-overload]
    assert list(torch._C._get_sdp_priority_order()) == [cudnn, *(each for each in order if each != cudnn)]
