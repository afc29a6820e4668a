"""Memory given back: what is in a mapped file stays what it is, and no longer counts as the process's own."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks.load_memory import memory_bytes
from jllm.models.weights.mapped import give_back, owned

SIZE = 8 << 20


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's account of a process's memory")
def test_pages_of_a_file_are_given_back(tmp_path: Path) -> None:
    values = torch.arange(SIZE, dtype=torch.int32)
    save_file({"first": values[: SIZE // 2].clone(), "second": values[SIZE // 2 :].clone()}, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        first, second = file.get_slice("first")[...], file.get_slice("second")[...]
        assert torch.equal(first, values[: SIZE // 2])
        assert torch.equal(second, values[SIZE // 2 :])
        before = memory_bytes()[1]
        give_back(first)
        give_back(second)
        assert before - memory_bytes()[1] > 0.9 * values.nbytes
        assert torch.equal(first, values[: SIZE // 2])
        assert torch.equal(second, values[SIZE // 2 :])


def test_other_memory_keeps_its_values() -> None:
    values = torch.arange(SIZE)
    give_back(values)
    assert torch.equal(values, torch.arange(SIZE))
    copy = owned(values)
    assert torch.equal(copy, values)
    assert copy.data_ptr() != values.data_ptr()
