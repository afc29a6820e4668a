"""Tensors as the bytes of a safetensors file, made now and written whenever it suits: also by a forked process, where
no tensor operation may take place.

Cost: a copy to host memory for tensors that are elsewhere; none for those that are there, unless asked for.
"""

import dataclasses
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jllm import atomic
from jllm.guards import notation

DTYPE_NAMES = {
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
"""The names that safetensors headers use."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileChecksums:
    """CRC-32 of everything that a file holds. They find damage, not forgery.

    Attributes:
        bytes: the file's size.
        header: the checksum of its header, the length in front of it included.
        tensors: that of each tensor's bytes, by name.
    """

    bytes: int
    header: int
    tensors: dict[str, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorFile:
    """A file, ready to be written: a header and, by tensor, raw buffers in host memory."""

    header: bytes
    buffers: dict[str, NDArray[np.uint8]]

    def write(self, path: Path) -> FileChecksums:
        """Write the file, completely or not at all; no tensor operation takes place."""
        checksums: dict[str, int] = {}
        with atomic.replacing(path) as temporary, temporary.open("wb") as file:
            file.write(self.header)
            for name, buffer in self.buffers.items():
                file.write(buffer.data)
                checksums[name] = zlib.crc32(buffer.data)
            size = file.tell()
        return FileChecksums(bytes=size, header=zlib.crc32(self.header), tensors=checksums)


def tensor_file(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, copy: bool) -> TensorFile:
    """The file that holds these tensors.

    Args:
        tensors: of any shape, on any device.
        metadata: texts for the file's header.
        copy: whether tensors that are in host memory already are copied too, so that they may go on changing.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    buffers: dict[str, NDArray[np.uint8]] = {}
    position = 0
    for name, tensor in tensors.items():
        host = tensor.detach().to("cpu", copy=copy).contiguous()
        end = position + host.numel() * host.element_size()
        header[name] = {"dtype": DTYPE_NAMES[host.dtype], "shape": list(host.shape), "data_offsets": [position, end]}
        flat = host.reshape(-1)
        if flat.stride() != (1,):  # one element of a view counts as contiguous whatever its stride
            flat = flat.clone(memory_format=torch.contiguous_format)
        buffers[name] = flat.view(torch.uint8).numpy()
        position = end
    return TensorFile(header=encoded_header(header), buffers=buffers)


def joined_file(parts: Sequence[Path], metadata: Mapping[str, str]) -> TensorFile:
    """One file with all that several hold, which have no name in common; no tensor operation takes place."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    buffers: dict[str, NDArray[np.uint8]] = {}
    position = 0
    for path in parts:
        held = np.fromfile(path, dtype=np.uint8)
        start = 8 + int.from_bytes(held[:8].tobytes(), "little")
        for name, entry in notation.loads(held[8:start].tobytes()).items():
            if name == "__metadata__":
                continue
            assert name not in header, f"{name} written by two stages"
            first, last = entry["data_offsets"]
            header[name] = {**entry, "data_offsets": [position, position + last - first]}
            buffers[name] = held[start + first : start + last]
            position += last - first
    return TensorFile(header=encoded_header(header), buffers=buffers)


def encoded_header(header: Mapping[str, Any]) -> bytes:
    """A safetensors header as it begins a file: its length, and the JSON, padded."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format aligns its data
    return len(text).to_bytes(8, "little") + text
