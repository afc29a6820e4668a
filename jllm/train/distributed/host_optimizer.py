"""`--offload_optimizer`: fp32 masters and the optimizer's state in host memory, updated by the processor.

DeepSpeed's optimizer for bf16 weights, with its fp32 partition moved to the host as soon as it is made, a parameter
group at a time. Gradients are summed in fp32 on the device; once a step this rank's share of the sum is copied to the
host, the optimizer of the run makes its update there, and the new weights are copied back.

Guarantees: norm, clipping, checkpoints and resume are those of a run without it; one may go on from the other. Gains:
with AdamW 12 bytes of device memory for each parameter of this rank's share. Costs: as many of host memory, the
processor's update, and two copies a step over the bus. The update is torch's own kernel: `DeepSpeedCPUAdam`, which each
machine has to compile, was no faster (`benchmarks/offload_optimizer.py`).
"""

from typing import Any

import torch
from torch import Tensor

from jllm.train.distributed.master_optimizer import MasterOptimizer


class HostOptimizer(MasterOptimizer):
    """DeepSpeed's optimizer for bf16 weights, its fp32 part on the host."""

    fp32_groups_gradient_flat_partition: list[Any]

    def _setup_for_real_optimizer(self) -> None:
        self.fp32_groups_flat_partition: list[Tensor] = _OnHost()
        super()._setup_for_real_optimizer()

    def step(self, closure: Any = None) -> None:
        """One update."""
        on_device: list[Any] = self.fp32_groups_gradient_flat_partition
        self.fp32_groups_gradient_flat_partition = [_Sent(gradient) for gradient in on_device]
        try:
            super().step(closure)
        finally:
            self.fp32_groups_gradient_flat_partition = on_device
            for partition in self.fp32_groups_flat_partition:
                partition.grad = None


class _OnHost(list[Tensor]):
    """Tensors that lie on the host whatever is put in."""

    def append(self, tensor: Tensor) -> None:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        super().append(host.copy_(tensor))


class _Sent:
    """A gradient on the device in the place where DeepSpeed's step asks for one of the master's type."""

    dtype = None
    """No type is the master's, so that it is asked."""

    def __init__(self, gradient: Tensor) -> None:
        self._gradient = gradient

    def to(self, dtype: torch.dtype) -> Tensor:
        """The gradient, on the host."""
        host = torch.empty(self._gradient.shape, dtype=dtype, pin_memory=self._gradient.is_cuda)
        return host.copy_(self._gradient)
