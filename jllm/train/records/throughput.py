"""How much of the hardware a run uses: model FLOPs utilisation, memory, and what CUDA says of its devices."""

import contextlib
import dataclasses
import resource
import sys
from collections.abc import Sequence
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from jllm.train.planning.cluster import peak_of


def peak_flops() -> float | None:
    """Operations a second that one device of this process could do at most; None where that is not known."""
    if get_accelerator().device_name() == "cpu" or not torch.cuda.is_available():
        return None
    return peak_of(torch.cuda.get_device_name())


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceUse:
    """What one process uses, or the most that any of several does.

    Attributes:
        memory: the peak so far, in MiB.
        reserved: the peak of what PyTorch took from the device, in MiB; -1 where there is no CUDA device.
        retries: how often memory was freed and asked for again, because there was none; -1 likewise.
        busy: per cent of the last moments in which the device computed; -1 where nobody says.
    """

    memory: int = 0
    reserved: int = -1
    retries: int = -1
    busy: int = -1

    @classmethod
    def now(cls) -> "DeviceUse":
        """Of this process."""
        if get_accelerator().device_name() != "cuda":
            return cls(memory=peak_memory())
        busy = -1
        with contextlib.suppress(Exception):  # no NVML package, no right to ask, a device in parts
            busy = int(torch.cuda.utilization())
        facts = torch.cuda.memory_stats()
        return cls(
            memory=peak_memory(),
            reserved=int(facts.get("reserved_bytes.all.peak", 0)) // 2**20,
            retries=int(facts.get("num_alloc_retries", 0)),
            busy=busy,
        )

    def numbers(self) -> list[int]:
        """As `DevicesUse.of` takes them."""
        return [self.memory, self.reserved, self.retries, self.busy]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DevicesUse:
    """What each stage uses, the most of its processes."""

    stages: tuple[DeviceUse, ...]

    @classmethod
    def of(cls, numbers: Sequence[Sequence[Sequence[int]]]) -> "DevicesUse":
        """Out of `DeviceUse.numbers` of the processes of each stage."""
        most = [[max(each) for each in zip(*processes, strict=True)] for processes in numbers]
        return cls(stages=tuple(DeviceUse(memory=m, reserved=r, retries=t, busy=b) for m, r, t, b in most))

    def record(self) -> dict[str, Any]:
        """As a training record has it; what is not known is left out."""
        found = {
            "memory_mib": [each.memory for each in self.stages],
            "reserved_mib": [each.reserved for each in self.stages],
            "alloc_retries": [each.retries for each in self.stages],
            "device_busy": [each.busy for each in self.stages],
        }
        return {key: values for key, values in found.items() if min(values) >= 0}
