"""Headers of safetensors files: what the format's own library writes is taken, and what it would not is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from jllm.errors import UserError
from jllm.guards.tensors import read_header

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def lay(path: Path, header: Any, data: bytes, *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int16, torch.bool]
)
def test_what_the_library_writes_is_taken(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "a": torch.zeros(2, 3, dtype=dtype),
        "empty": torch.zeros(0, 4, dtype=dtype),
        "one": torch.ones((), dtype=dtype),
    }
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "a.safetensors")
    assert header.pop("__metadata__") == {"format": "pt"}
    assert {name: entry["shape"] for name, entry in header.items()} == {
        name: [*each.shape] for name, each in tensors.items()
    }
    assert lay(tmp_path / "b", {"a": ENTRY}, bytes(8)).exists()
    assert read_header(tmp_path / "b") == {"a": ENTRY}
    assert load_file(tmp_path / "b")["a"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("header", "data", "length"),
    [
        ({"a": ENTRY}, bytes(8), 1 << 63),
        ({"a": ENTRY}, bytes(8), 200_000_000),
        ({"a": ENTRY}, bytes(8), 0),
        ({"a": ENTRY}, bytes(7), None),
        ({"a": ENTRY}, bytes(9), None),
        ({"a": {**ENTRY, "data_offsets": [0, 1 << 62]}}, bytes(8), None),
        ({"a": {**ENTRY, "data_offsets": [4, 12]}}, bytes(12), None),
        ({"a": {**ENTRY, "data_offsets": [-8, 0]}}, bytes(8), None),
        ({"a": {**ENTRY, "data_offsets": "08"}}, bytes(8), None),
        ({"a": {**ENTRY, "shape": [3]}}, bytes(8), None),
        ({"a": {**ENTRY, "shape": [-2]}}, bytes(8), None),
        ({"a": {**ENTRY, "shape": [True, 2]}}, bytes(8), None),
        ({"a": {**ENTRY, "shape": [1 << 62, 1 << 62]}}, bytes(8), None),
        ({"a": {**ENTRY, "shape": None}}, bytes(8), None),
        ({"a": {**ENTRY, "dtype": "F33"}}, bytes(8), None),
        ({"a": {**ENTRY, "dtype": ["F32"]}}, bytes(8), None),
        ({"a": ENTRY, "b": ENTRY}, bytes(8), None),
        ({"a": None}, b"", None),
        ({"__metadata__": {"a": 1}}, b"", None),
        ({"__metadata__": []}, b"", None),
        ([], b"", None),
        (b"[" * 100_000, b"", None),
        (b"{" + b" " * 50, b"", None),
    ],
)
def test_what_cannot_be_so_is_one_line(tmp_path: Path, header: Any, data: bytes, length: int | None) -> None:
    with pytest.raises(UserError, match=r"is not a safetensors file \(.+\); download it again") as refused:
        read_header(lay(tmp_path / "a.safetensors", header, data, length=length))
    assert len(str(refused.value)) < 600


@pytest.mark.parametrize("data", [b"", b"1234567", b"\0" * 8])
def test_short_files_are_none(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(UserError, match="is not a safetensors file"):
        read_header(tmp_path / "a")
