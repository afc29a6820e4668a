"""A stage that trains nothing has a parameter with a gradient, and computes what it did."""

from pathlib import Path

import torch

from jllm.train.optim.placeholder import add_placeholder
from tests.models.chain import load_chain, packed_batch
from tests.models.family_check import make_folder
from tests.models.tiny import tiny_config


def test_it_changes_nothing(tmp_path: Path) -> None:
    make_folder(tiny_config("llama"), tmp_path)
    [stage] = load_chain(tmp_path, [0, 4])
    inputs = packed_batch(96)
    expected = stage(inputs)
    for parameter in stage.parameters():
        parameter.requires_grad_(False)
    add_placeholder(stage, torch.float32, "cpu")
    loss = stage(inputs)
    assert torch.equal(loss, expected)
    loss.backward()
    assert [name for name, parameter in stage.named_parameters() if parameter.grad is not None] == ["placeholder"]
