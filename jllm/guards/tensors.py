"""The header of a safetensors file, believed only where the file can be what it says.

A header names tensors with dtype, shape and place. Its own length, and everything in it, comes from the file: it is
held against the file's size before memory is taken for it.

Guarantees: of a header that is given out, every tensor lies in the file, has as many bytes as its dtype and shape make,
and shares none with another; together they are all that the file holds, as the format has it.
Cost: the header is read once, and looked through.
"""

import math
import os
from pathlib import Path
from typing import Any

from jllm.errors import UserError
from jllm.guards import notation

LARGEST_HEADER = 100_000_000
"""Bytes, as the format's own reader has it."""
MOST_DIMENSIONS = 64
METADATA = "__metadata__"
BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


def read_header(path: str | Path, *, advice: str = "download it again") -> dict[str, Any]:
    """The header: name → dtype, shape and `data_offsets` (bytes from where the header ends), and `METADATA`.

    Raises:
        UserError: it is no header, or not that of this file.
        OSError: the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            whole = os.fstat(file.fileno()).st_size
            size = int.from_bytes(file.read(8), "little")
            if whole < 8 or not 2 <= size <= min(whole - 8, LARGEST_HEADER):
                most = f"; at most {LARGEST_HEADER:,} are read" if size > LARGEST_HEADER else ""
                raise ValueError(f"its first bytes say that {size:,} follow as a header, of {whole:,}{most}")
            header = notation.loads(file.read(size))
        _check(header, whole - 8 - size)
    except ValueError as error:
        raise UserError(f"{path} is not a safetensors file ({f'{error}'[:300]}); {advice}") from None
    found: dict[str, Any] = header
    return found


def _check(header: Any, size: int) -> None:
    """Raises:
    ValueError: it is no header of `size` bytes of tensors.
    """
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    metadata = header.get(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata are no texts")
    places = sorted((*_place(name, entry), name) for name, entry in header.items() if name != METADATA)
    at = 0
    for begin, end, name in places:
        if begin != at:
            raise ValueError(f"{name!r} begins at byte {begin:,}, and the tensor before it ends at {at:,}")
        at = end
    if at != size:
        raise ValueError(f"its tensors have {at:,} bytes, and the file has {size:,} for them")


def _place(name: str, entry: Any) -> tuple[int, int]:
    if not isinstance(entry, dict):
        raise ValueError(f"{name!r} is no tensor")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"{name!r} is of the dtype {dtype!r}, which is not known")
    if not isinstance(shape, list) or not all(map(_is_size, shape)) or len(shape) > MOST_DIMENSIONS:
        raise ValueError(f"{name!r} has a shape that is none")
    if not isinstance(offsets, list) or not all(map(_is_size, offsets)) or len(offsets) != 2:
        raise ValueError(f"{name!r} has a place that is none")
    begin, end = offsets
    bits = math.prod(shape) * BITS[dtype]
    if bits != (end - begin) * 8:
        raise ValueError(f"{name!r} has {end - begin:,} bytes, and its dtype and shape make {bits / 8:,.0f}")
    return begin, end


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63
