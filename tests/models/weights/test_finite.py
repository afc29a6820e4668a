"""A weight that is not finite is named, in memory and on disk, in every kind of file."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from jllm.errors import UserError
from jllm.models.weights.finite import check_finite, check_stored_weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_any_place_of_any_type(dtype: torch.dtype, value: str) -> None:
    tensors = {"a": torch.randn(7, 5).to(dtype), "b": torch.randn(3, 2, 4).to(dtype), "ids": torch.arange(3)}
    check_finite(tensors.items(), "m")
    tensors["b"][2, 1, 3] = float(value)
    with pytest.raises(UserError, match=f"^m: the tensor b holds {'NaN' if value == 'nan' else 'infinity'}"):
        check_finite(tensors.items(), "m")


def test_largest_numbers_and_empty_tensors_are_let_through() -> None:
    largest = torch.full((2,), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16)
    check_finite([("largest", largest), ("none", torch.empty(0)), ("meta", torch.empty(2, device="meta"))], "m")


def test_stored_weights(tmp_path: Path) -> None:
    bad = torch.tensor([1.0, float("nan")])
    for name in ("safe", "pickled"):
        (tmp_path / name).mkdir()
    save_file({"x": torch.ones(2), "y": bad}, tmp_path / "safe/model.safetensors")
    torch.save({"x": torch.ones(2), "y": bad}, tmp_path / "pickled/pytorch_model.bin")
    for name, file in (("safe", "model.safetensors"), ("pickled", "pytorch_model.bin")):
        with pytest.raises(UserError, match=f"{file}: the tensor y holds NaN"):
            check_stored_weights(tmp_path / name)
    save_file({"x": torch.ones(2)}, tmp_path / "safe/model.safetensors")
    check_stored_weights(tmp_path / "safe")
