"""Tensors as the bytes of a safetensors file, made now and written whenever it suits: also by a forked process, where
no tensor operation may take place.

Cost: a copy to host memory for tensors that are elsewhere; none for those that are there, unless asked for.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jllm import atomic

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorFile:
    """A file, ready to be written: a header and raw buffers in host memory."""

    header: bytes
    buffers: list[NDArray[np.uint8]]

    def write(self, path: Path) -> None:
        """Write the file, completely or not at all; no tensor operation takes place."""
        with atomic.replacing(path) as temporary, temporary.open("wb") as file:
            file.write(self.header)
            for buffer in self.buffers:
                file.write(buffer.data)


def tensor_file(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, copy: bool) -> TensorFile:
    """The file that holds these tensors.

    Args:
        tensors: of any shape, on any device.
        metadata: texts for the file's header.
        copy: whether tensors that are in host memory already are copied too, so that they may go on changing.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    buffers = []
    position = 0
    for name, tensor in tensors.items():
        host = tensor.detach().to("cpu", copy=copy).contiguous()
        end = position + host.numel() * host.element_size()
        header[name] = {"dtype": _DTYPE_NAMES[host.dtype], "shape": list(host.shape), "data_offsets": [position, end]}
        flat = host.reshape(-1)
        if flat.stride() != (1,):  # one element of a view counts as contiguous whatever its stride
            flat = flat.clone(memory_format=torch.contiguous_format)
        buffers.append(flat.view(torch.uint8).numpy())
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format aligns its data
    return TensorFile(header=len(text).to_bytes(8, "little") + text, buffers=buffers)
