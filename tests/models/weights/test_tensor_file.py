"""Files of tensors: what safetensors reads is what was given, and a copy does not change with it."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from jllm.models.weights.tensor_file import joined_file, tensor_file

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)
shapes = st.lists(st.integers(0, 5), max_size=3)


@settings(deadline=None)
@given(given_tensors=st.lists(st.tuples(shapes, st.sampled_from(DTYPES), st.booleans()), max_size=5))
def test_safetensors_reads_what_was_given(
    given_tensors: list[tuple[list[int], torch.dtype, bool]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Any shape and type, whether the tensor lies in one piece or is a view across another."""
    path = tmp_path_factory.mktemp("tensors") / "a.safetensors"
    tensors = {}
    for number, (shape, dtype, is_view) in enumerate(given_tensors):
        tensor = torch.randint(0, 2, (*shape, 2) if is_view else shape).to(dtype)
        tensors[f"tensor {number}"] = tensor[..., 1] if is_view else tensor
    tensor_file(tensors, {"format": "pt", "more": "text"}, copy=False).write(path)
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].equal(tensor)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "more": "text"}


@pytest.mark.parametrize("copy", [False, True])
def test_a_copy_stays_as_it_was(copy: bool, tmp_path: Path) -> None:
    tensor = torch.zeros(4)
    file = tensor_file({"a": tensor}, {}, copy=copy)
    tensor += 1
    file.write(tmp_path / "a.safetensors")
    assert load_file(tmp_path / "a.safetensors")["a"].tolist() == [0.0 if copy else 1.0] * 4


def test_files_are_joined(tmp_path: Path) -> None:
    tensors = {f"t{number}": torch.randn(number, 3).to(dtype) for number, dtype in enumerate(DTYPES[:6])}
    names = list(tensors)
    parts = []
    for number, own in enumerate((names[:1], names[1:4], names[4:])):
        parts.append(tmp_path / f"{number}.safetensors")
        tensor_file({name: tensors[name] for name in own}, {"format": "pt"}, copy=False).write(parts[-1])
    joined_file(parts, {"format": "pt"}).write(tmp_path / "whole.safetensors")
    found = load_file(tmp_path / "whole.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in names)
