"""Safetensors files read and written tensor by tensor, in blocks of bytes; no file is mapped, and none is held.

What is written is known by name, type and shape before a byte of it is there, so a file's header comes first and its
tensors follow as they are made. A tensor that is passed on unchanged is copied byte by byte.

Guarantees: a file of the same tensors in the same order is the one that `jllm.models.weights.tensor_file` makes.
Cost: one block of `BLOCK_BYTES` at a time; of pickled files, which are mapped, what the system keeps of them.
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from jllm import atomic
from jllm.errors import UserError, say
from jllm.models.weights.source import pickled_files, read_header, weight_files
from jllm.models.weights.tensor_file import DTYPE_NAMES, encoded_header

BLOCK_BYTES = 2**24
TORCH_TYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
"""Type in a safetensors header → ours; there are more that nothing here computes with."""


class StoredTensor(Protocol):
    """A tensor of a model folder, of which nothing is in memory.

    Attributes:
        name: in the file.
        dtype: as safetensors headers name it.
        shape: its own.
        nbytes: of all its elements.
    """

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...

    def blocks(self) -> Iterator[Any]:
        """Its bytes, in order."""

    def rows(self, start: int, stop: int) -> Tensor:
        """Entries [start, stop) along the first axis, in the stored type."""


@dataclass(frozen=True, kw_only=True)
class TensorInFile:
    """A `StoredTensor` of a safetensors file: bytes [begin, begin + nbytes) of it."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int

    def blocks(self) -> Iterator[Any]:
        with self.path.open("rb") as file:
            file.seek(self.begin)
            left = self.nbytes
            while left:
                block = file.read(min(left, BLOCK_BYTES))
                if not block:
                    raise UserError(f"{self.path} ends within {self.name}; download it again")
                left -= len(block)
                yield block

    def rows(self, start: int, stop: int) -> Tensor:
        row = self.nbytes // max(1, self.shape[0])
        held = np.fromfile(self.path, dtype=np.uint8, count=(stop - start) * row, offset=self.begin + start * row)
        return torch.from_numpy(held).view(TORCH_TYPES[self.dtype]).reshape(stop - start, *self.shape[1:])


@dataclass(frozen=True, kw_only=True)
class TensorInMemory:
    """A `StoredTensor` that is there, or mapped, as those of pickled files are."""

    name: str
    tensor: Tensor

    @property
    def dtype(self) -> str:
        return DTYPE_NAMES[self.tensor.dtype]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    def blocks(self) -> Iterator[Any]:
        if self.tensor.ndim < 2:
            yield tensor_bytes(self.tensor)
            return
        yield from (tensor_bytes(self.rows(*ends)) for ends in row_blocks(self.shape, self.tensor.element_size()))

    def rows(self, start: int, stop: int) -> Tensor:
        return self.tensor[start:stop]


@dataclass(frozen=True, kw_only=True)
class StreamedTensor:
    """A tensor that is going to be written.

    Attributes:
        name, dtype, shape: as in the file's header.
        nbytes: how many bytes there will be.
        blocks: makes them, in order.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    blocks: Callable[[], Iterator[Any]]


def passed_on(tensor: StoredTensor, name: str | None = None) -> StreamedTensor:
    """A stored tensor as it is, under its own name or another one."""
    return StreamedTensor(
        name=name or tensor.name, dtype=tensor.dtype, shape=tensor.shape, nbytes=tensor.nbytes, blocks=tensor.blocks
    )


def computed(
    name: str, dtype: torch.dtype, shape: tuple[int, ...], rows: Callable[[int, int], Tensor]
) -> StreamedTensor:
    """A tensor that is made some rows at a time; `rows(start, stop)` gives them in any floating type."""

    def blocks() -> Iterator[Any]:
        for start, stop in row_blocks(shape, 4):
            yield tensor_bytes(rows(start, stop).to(dtype))

    nbytes = math.prod(shape) * dtype.itemsize
    return StreamedTensor(name=name, dtype=DTYPE_NAMES[dtype], shape=shape, nbytes=nbytes, blocks=blocks)


def made_whole(name: str, dtype: torch.dtype, shape: tuple[int, ...], make: Callable[[], Tensor]) -> StreamedTensor:
    """A tensor that is made in one piece, in its type, when its turn comes."""
    nbytes = math.prod(shape) * dtype.itemsize
    return StreamedTensor(
        name=name, dtype=DTYPE_NAMES[dtype], shape=shape, nbytes=nbytes, blocks=lambda: iter([tensor_bytes(make())])
    )


def row_blocks(shape: tuple[int, ...], itemsize: int) -> Iterator[tuple[int, int]]:
    """Ranges along the first axis, each of at most `BLOCK_BYTES`, or one entry."""
    step = max(1, BLOCK_BYTES // max(1, math.prod(shape[1:]) * itemsize))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def tensor_bytes(tensor: Tensor) -> Any:
    """The bytes of a tensor in host memory."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_streamed(path: Path, tensors: Sequence[StreamedTensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, completely or not at all."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for tensor in tensors:
        end = position + tensor.nbytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    with atomic.replacing(path) as temporary, temporary.open("wb") as file:
        file.write(encoded_header(header))
        for tensor in tensors:
            begin = file.tell()
            for block in tensor.blocks():
                file.write(block)
            assert file.tell() - begin == tensor.nbytes, tensor.name


def write_files(
    folder: Path, files: Sequence[tuple[str, Sequence[StreamedTensor]]], metadata: Mapping[str, str]
) -> None:
    """Write the files of a model, by name; where they are several, each is said on standard error when it begins."""
    size = sum(tensor.nbytes for _, tensors in files for tensor in tensors)
    for number, (name, tensors) in enumerate(files, start=1):
        if len(files) > 1:
            say(f"writing file {number} of {len(files)}, {size / 1e9:,.2f} GB in all", file=sys.stderr)
        write_streamed(folder / name, tensors, metadata)


def stored_tensors(folder: Path) -> list[list[StoredTensor]]:
    """The tensors of a model folder, file by file, in the order of their bytes.

    Raises:
        UserError: there are no weights, a file cannot be read, or one has been cut.
    """
    safe: list[list[StoredTensor]] = [
        list(_of_safetensors(path)) for path in weight_files(folder, advice="download them")
    ]
    return safe or [list(_of_pickle(path)) for path in pickled_files(folder)]


def _of_safetensors(path: Path) -> Iterator[StoredTensor]:
    header = read_header(path)
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = entry["data_offsets"]
        shape = tuple(entry["shape"])
        yield TensorInFile(
            path=path, name=name, dtype=entry["dtype"], shape=shape, begin=start + first, nbytes=last - first
        )


def _of_pickle(path: Path) -> Iterator[StoredTensor]:
    try:
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, UnpicklingError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} cannot be read as a file of weights ({reason}); download it again") from None
    for name, tensor in tensors.items():
        yield TensorInMemory(name=name, tensor=tensor)
