"""Weights in few bits, some rows at a time, against bitsandbytes' own reading of all of them."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from jllm.errors import UserError
from jllm.models.weights.dequantised import plain_configuration, plain_tensors, whole
from jllm.models.weights.streamed_file import stored_tensors


def write(folder: Path, weight: torch.Tensor, kind: str, *, nested: bool, block: int) -> torch.Tensor:
    """A file with one quantised weight `x.weight`; what bitsandbytes reads, flat, as the blocks lie."""
    functional = pytest.importorskip("bitsandbytes").functional
    packed, state = functional.quantize_4bit(weight, quant_type=kind, compress_statistics=nested, blocksize=block)
    parts = {f"x.weight.{name}": value for name, value in state.as_dict(packed=True).items()}
    save_file({"x.weight": packed, **parts, "norm": torch.ones(3)}, folder / "model.safetensors")
    state.shape, state.dtype = torch.Size([weight.numel()]), torch.float32
    read: torch.Tensor = functional.dequantize_4bit(packed, state).reshape(weight.shape)
    return read


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 9), columns=st.integers(1, 40).map(lambda each: 4 * each), nested=st.booleans(),
    kind=st.sampled_from(["nf4", "fp4"]), data=st.data(),
)  # fmt: skip
def test_any_rows(
    tmp_path_factory: pytest.TempPathFactory, rows: int, columns: int, nested: bool, kind: str, data: st.DataObject
) -> None:
    """Also where rows begin within a block."""
    folder = tmp_path_factory.mktemp("weights")
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns))
    expected = write(folder, weight, kind, nested=nested, block=64)
    [tensors] = plain_tensors(stored_tensors(folder), folder)
    found = {tensor.name: tensor for tensor in tensors}
    assert found.keys() == {"x.weight", "norm"}
    assert (found["x.weight"].shape, found["x.weight"].dtype) == ((rows, columns), "BF16")
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    torch.testing.assert_close(found["x.weight"].rows(start, stop), expected[start:stop], atol=1e-6, rtol=1e-6)
    assert (whole(found["x.weight"]) - weight).abs().max() < 0.5 * weight.abs().max() + 0.2
    content = b"".join(map(bytes, found["x.weight"].blocks()))
    assert torch.equal(torch.frombuffer(bytearray(content), dtype=torch.bfloat16), expected.bfloat16().reshape(-1))


def test_eight_bits(tmp_path: Path) -> None:
    packed, scales = torch.randint(-127, 128, (5, 6), dtype=torch.int8), torch.rand(5)
    save_file({"x.weight": packed, "x.SCB": scales, "x.weight_format": torch.tensor(0)}, tmp_path / "model.safetensors")
    [[found]] = plain_tensors(stored_tensors(tmp_path), tmp_path)
    torch.testing.assert_close(whole(found), packed.float() * scales[:, None] / 127)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    write(tmp_path, torch.randn(4, 64), "nf4", nested=True, block=64)
    [tensors] = stored_tensors(tmp_path)
    left = {tensor.name: whole(tensor) for tensor in tensors if "nested_absmax" not in tensor.name}
    save_file(left, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"x.weight is in 4 bits and has no nested_absmax"):
        plain_tensors(stored_tensors(tmp_path), tmp_path)


def test_configurations(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "model.safetensors")
    assert plain_configuration({"a": 1}, tmp_path) == (False, {"a": 1})
    raw = {"a": 1, "torch_dtype": "float16", "quantization_config": {"quant_method": "bitsandbytes"}}
    assert plain_configuration(raw, tmp_path) == (True, {"a": 1, "dtype": "bfloat16"})
    other = json.loads(json.dumps({"quantization_config": {"quant_method": "gptq"}}))
    assert plain_configuration(other, tmp_path) == (False, other), "which is refused where it is read"
