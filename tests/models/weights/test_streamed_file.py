"""Files written tensor by tensor are those written at once; what is read in parts is what is there."""

from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from jllm.errors import UserError
from jllm.models.weights import streamed_file
from jllm.models.weights.streamed_file import computed, made_whole, passed_on, stored_tensors, write_streamed
from jllm.models.weights.tensor_file import tensor_file

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8, torch.int64, torch.float8_e4m3fn)
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(SHAPES, st.sampled_from(DTYPES)), min_size=1, max_size=4), st.integers(1, 64))
def test_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[tuple[tuple[int, ...], torch.dtype]], block: int
) -> None:
    """Whatever the blocks; passed on, made in rows, made in one piece."""
    folder = tmp_path_factory.mktemp("files")
    tensors = {f"t{number}": torch.randint(0, 100, shape).to(dtype) for number, (shape, dtype) in enumerate(kinds)}
    tensor_file(tensors, {"format": "pt"}, copy=False).write(folder / "model.safetensors")
    expected = (folder / "model.safetensors").read_bytes()
    with patch.object(streamed_file, "BLOCK_BYTES", block):
        [found] = stored_tensors(folder)
        write_streamed(folder / "passed", [passed_on(tensor) for tensor in found], {"format": "pt"})
        made = [
            computed(name, tensor.dtype, tuple(tensor.shape), lambda start, stop, tensor=tensor: tensor[start:stop])  # type: ignore[misc]
            if tensor.ndim and tensor.is_floating_point()
            else made_whole(name, tensor.dtype, tuple(tensor.shape), lambda tensor=tensor: tensor)  # type: ignore[misc]
            for name, tensor in tensors.items()
        ]
        write_streamed(folder / "made", made, {"format": "pt"})
    assert (folder / "passed").read_bytes() == expected
    assert (folder / "made").read_bytes() == expected
    for tensor in found:
        if tensor.shape and tensor.shape[0] > 1 and tensor.nbytes:
            part = tensor.rows(1, tensor.shape[0]).view(torch.uint8)
            assert torch.equal(part, tensors[tensor.name][1:].contiguous().view(torch.uint8))


def test_pickled_files_too(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(7, 3), "b": torch.randn(4, 6)[:, ::2], "c": torch.tensor(2.0)}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    [found] = stored_tensors(tmp_path)
    with patch.object(streamed_file, "BLOCK_BYTES", 16):
        write_streamed(tmp_path / "x", [passed_on(tensor) for tensor in found], {})
    tensor_file(tensors, {}, copy=False).write(tmp_path / "y")
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_what_is_cut_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(9)}, tmp_path / "model.safetensors")
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        UserError, match=r"its tensors have 36 bytes, and the file has 35 for them\); download it again"
    ):
        stored_tensors(tmp_path)
    path.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin cannot be read as a file of weights"):
        stored_tensors(tmp_path)
