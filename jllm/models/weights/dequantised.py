"""Weights as bitsandbytes saved them, in 4 or 8 bits, read as bf16: a block of rows at a time.

A 4-bit weight lies in several tensors: the packed elements, a scale for each block of them, and a small JSON text that
says of which shape and kind it is. An 8-bit one has a scale for each row.

Guarantees: the values are those that bitsandbytes computes with, before they are rounded to bf16.
Cost: the scales of one weight, and the rows that are asked for in fp32.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jllm.errors import UserError
from jllm.guards import notation
from jllm.machine import require_package
from jllm.models.weights.source import check_plain_weights
from jllm.models.weights.streamed_file import StoredTensor, row_blocks, tensor_bytes

STATE = ".quant_state.bitsandbytes__"
SETTINGS = "quantization_config"


def plain_configuration(raw: dict[str, Any], folder: Path, *, with_weights: bool = True) -> tuple[bool, dict[str, Any]]:
    """Whether a model is in 4 or 8 bits of bitsandbytes, and its configuration as that of a plain one.

    `with_weights` also looks at the files of one whose configuration says nothing.

    Raises:
        UserError: it is quantised in another way.
    """
    settings = raw.get(SETTINGS)
    if isinstance(settings, dict) and "bitsandbytes" in str(settings.get("quant_method")):
        plain = {name: value for name, value in raw.items() if name not in (SETTINGS, "torch_dtype")}
        return True, {**plain, "dtype": "bfloat16"}
    if with_weights and SETTINGS not in raw:  # else the configuration itself is refused where it is read
        check_plain_weights(folder)
    return False, raw


def plain_tensors(files: list[list[StoredTensor]], folder: Path) -> list[list[StoredTensor]]:
    """The tensors of a model with those in few bits read as bf16, and without those that only describe them.

    Raises:
        UserError: bitsandbytes is not installed, or a weight lacks what describes it.
    """
    known = {tensor.name: tensor for tensors in files for tensor in tensors}
    made: dict[str, StoredTensor] = {}
    parts: set[str] = set()
    for name, tensor in known.items():
        if tensor.dtype == "U8" and any(f"{name}{STATE}{kind}" in known for kind in ("nf4", "fp4")):
            own = {each.removeprefix(name): known[each] for each in known if each.startswith(name + ".")}
            made[name] = FourBits.of(tensor, own, folder)
            parts |= {name + each for each in own}
        elif tensor.dtype == "I8" and (scales := f"{name.removesuffix('weight')}SCB") in known:
            made[name] = EightBits(packed=tensor, scales=known[scales])
            parts |= {scales, f"{name}_format"}
    return [[made.get(each.name, each) for each in tensors if each.name not in parts] for tensors in files]


@dataclass(frozen=True, kw_only=True)
class FourBits:
    """A `StoredTensor` that is packed, two elements in a byte.

    Attributes:
        packed: its elements.
        parts: scales and tables, by the ends of their names.
        facts: what its JSON text says.
    """

    packed: StoredTensor
    parts: Mapping[str, StoredTensor]
    facts: Mapping[str, Any]
    dtype: str = "BF16"

    @classmethod
    def of(cls, packed: StoredTensor, parts: Mapping[str, StoredTensor], folder: Path) -> "FourBits":
        """Read what describes a weight.

        Raises:
            UserError: something of that is missing.
        """
        require_package("bitsandbytes", f"{folder}, which is in 4 bits,", "adapters")
        text = next(each for name, each in parts.items() if name.startswith(STATE))
        try:
            facts = notation.loads(bytes(whole(text).tolist()))
        except ValueError as error:
            raise UserError(f"{folder}: {text.name} is no JSON ({error}); download the weights again") from None
        needed = [".absmax", ".quant_map", *([".nested_absmax", ".nested_quant_map"] * ("nested_offset" in facts))]
        missing = [name for name in needed if name not in parts]
        missing += [name for name in ("shape", "blocksize", "quant_type") if name not in facts]
        if missing:
            raise UserError(
                f"{folder}: {packed.name} is in 4 bits and has no {missing[0].lstrip('.')}; download the weights again"
            )
        return cls(packed=packed, parts=parts, facts=facts)

    @property
    def name(self) -> str:
        return self.packed.name

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.facts["shape"])

    @property
    def nbytes(self) -> int:
        return 2 * math.prod(self.shape)

    def blocks(self) -> Iterator[Any]:
        for start, stop in row_blocks(self.shape, 4):
            yield tensor_bytes(self.rows(start, stop).to(torch.bfloat16))

    def rows(self, start: int, stop: int) -> Tensor:
        """Entries [start, stop) along the first axis, fp32: of the blocks of elements that hold them."""
        from bitsandbytes import functional

        block, row, count = self.facts["blocksize"], math.prod(self.shape[1:]), math.prod(self.shape)
        first = start * row // block * block
        last = min(count, -(-stop * row // block) * block)
        state = functional.QuantState(
            absmax=self._scales()[first // block : -(-last // block)],
            shape=torch.Size([last - first]),
            code=whole(self.parts[".quant_map"]),
            blocksize=block,
            quant_type=self.facts["quant_type"],
            dtype=torch.float32,
        )
        held = self.packed.rows(first // 2, -(-last // 2)).reshape(-1, 1)
        values: Tensor = functional.dequantize_4bit(held, state).reshape(-1)
        return values[start * row - first : stop * row - first].reshape(stop - start, *self.shape[1:])

    def _scales(self) -> Tensor:
        """The scale of each block, which may be in 8 bits itself."""
        from bitsandbytes import functional

        scales = whole(self.parts[".absmax"])
        if "nested_offset" not in self.facts:
            return scales.float()
        state = functional.QuantState(
            absmax=whole(self.parts[".nested_absmax"]),
            blocksize=self.facts["nested_blocksize"],
            code=whole(self.parts[".nested_quant_map"]),
            dtype=torch.float32,
        )
        return functional.dequantize_blockwise(scales, state) + float(self.facts["nested_offset"])


@dataclass(frozen=True, kw_only=True)
class EightBits:
    """A `StoredTensor` of whole numbers up to 127, each row with its largest value."""

    packed: StoredTensor
    scales: StoredTensor
    dtype: str = "BF16"

    @property
    def name(self) -> str:
        return self.packed.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.packed.shape

    @property
    def nbytes(self) -> int:
        return 2 * self.packed.nbytes

    def blocks(self) -> Iterator[Any]:
        for start, stop in row_blocks(self.shape, 4):
            yield tensor_bytes(self.rows(start, stop).to(torch.bfloat16))

    def rows(self, start: int, stop: int) -> Tensor:
        scales = self.scales.rows(start, stop).float()
        return self.packed.rows(start, stop).float() * (scales[:, None] / 127)


def whole(tensor: StoredTensor) -> Tensor:
    """All of a stored tensor."""
    return tensor.rows(0, tensor.shape[0]) if tensor.shape else tensor.rows(0, 1).reshape(())
