"""How much of the hardware a run uses: model FLOPs utilisation and peak memory."""

import resource
import sys

import torch
from deepspeed.accelerator import get_accelerator

PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "A10": 125e12,
    "RTX 6000 Ada": 364e12,
    "RTX A6000": 155e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
}
"""Dense 16-bit tensor operations a second, by the vendors' datasheets; the first name that the device's contains."""


def peak_flops() -> float | None:
    """Operations a second that one device of this process could do at most; None where that is not known."""
    if get_accelerator().device_name() == "cpu" or not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


def peak_memory() -> int:
    """The most memory this process has used so far, in MiB: the device's, or on CPU resident memory."""
    if get_accelerator().device_name() == "cpu":
        kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return kib // 1024 if sys.platform != "darwin" else kib // 2**20
    return int(get_accelerator().max_memory_allocated()) // 2**20


def utilisation(tokens_per_second: float, flops_per_token: float, world_size: int) -> float | None:
    """Model FLOPs utilisation: operations the model needs a second over those the devices could do; None if unknown.

    `flops_per_token` is forward and backward (Chowdhery et al. 2022, appendix B); recomputation does not count.
    """
    peak = peak_flops()
    return None if peak is None else tokens_per_second * flops_per_token / (peak * world_size)
