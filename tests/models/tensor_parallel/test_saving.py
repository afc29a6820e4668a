"""Slices written into one folder: byte for byte the files of a stage that lies in one piece."""

import copy
from pathlib import Path

import pytest
import torch

from jllm.models.pipeline.span import spans_of
from jllm.models.tensor_parallel.saving import sliced_files
from jllm.models.tensor_parallel.slicing import slice_stage
from jllm.models.weights.loading import load_stage
from jllm.models.weights.saving import save_stage, write_index
from jllm.parallel.tensor.group import TensorGroup
from tests.models.family_check import make_folder
from tests.models.slice_check import SLICED
from tests.models.tiny import tiny_config
from tests.odd_files import files_of_at_most


@pytest.mark.parametrize("family", [*SLICED, "deepseek_v3", "gpt_oss", "glm4", "olmo2", "aria_text"])
def test_files_are_those_of_whole_stages(tmp_path: Path, family: str) -> None:
    source, whole, sliced = (tmp_path / name for name in ("source", "whole", "sliced"))
    make_folder(tiny_config(family, tied=family in ("gemma2", "qwen2"), vocab_size=97), source)
    sliced.mkdir()
    sizes = {"dtype": torch.bfloat16, "source": None, "shard_bytes": 2**14}
    for span in spans_of([0, 1, 4]):
        model = load_stage(source, span, dtype=torch.float32)
        save_stage(model, span, whole, **sizes)  # type: ignore[arg-type]
        ranks = []
        for rank in range(2):
            mine = copy.deepcopy(model)
            slice_stage(mine, TensorGroup(rank=rank, size=2, handle=None))
            ranks.append(sliced_files(mine, span, rank=rank, ranks=2, **sizes))  # type: ignore[arg-type]
        for file in ranks[0]:
            file.begin(sliced)
        for rank, files in reversed(list(enumerate(ranks))):
            for file in files:
                file.write(sliced, is_first=rank == 0)
    assert write_index(whole) == write_index(sliced)
    files = sorted(path.name for path in whole.iterdir())
    assert files == sorted(path.name for path in sliced.iterdir())
    assert len(files) > 3
    for name in files:
        assert (whole / name).read_bytes() == (sliced / name).read_bytes(), name


def test_a_file_that_a_disk_does_not_take_is_named(tmp_path: Path) -> None:
    """By the rank that makes room for it, and by one that writes its slices."""
    make_folder(tiny_config("llama", tied=False), tmp_path / "source")
    [span] = spans_of([0, 4])
    model = load_stage(tmp_path / "source", span, dtype=torch.float32)
    slice_stage(model, TensorGroup(rank=1, size=2, handle=None))
    [file] = sliced_files(model, span, dtype=torch.float32, source=None, rank=1, ranks=2)
    path = tmp_path / file.name
    with pytest.raises(OSError, match="too large") as caught, files_of_at_most(1000):
        file.begin(tmp_path)
    assert caught.value.filename == str(path)
    file.begin(tmp_path)
    with pytest.raises(OSError, match="too large") as caught, files_of_at_most(5000):
        file.write(tmp_path, is_first=False)
    assert caught.value.filename == str(path)
