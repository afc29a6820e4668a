"""Utilisation: what the model needs a second over what the devices could do; none where that is not known."""

from types import SimpleNamespace

import pytest
import torch

from jllm.train.records import throughput


def test_nothing_is_claimed_of_a_device_that_is_not_known() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert throughput.peak_flops() is None
    assert throughput.utilisation(1000, 1e9, 4) is None
    assert throughput.peak_memory() > 0


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("Some new device", None),
    ],
)
def test_utilisation(name: str, flops: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "get_accelerator", lambda: SimpleNamespace(device_name=lambda: "cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert throughput.peak_flops() == flops
    share = throughput.utilisation(10_000, 5e9, 4)
    assert share == (None if flops is None else pytest.approx(10_000 * 5e9 / (4 * flops)))
