"""Recomputing or offloading activations changes memory, never the loss or a gradient."""

from pathlib import Path

import pytest
import torch

from jllm.errors import UserError
from jllm.models.activation_checkpointing import checkpoint_activations
from jllm.models.stage import PipelineStage
from tests.models.chain import chained_loss_and_gradients, load_chain, packed_batch
from tests.models.family_check import make_folder
from tests.models.tiny import tiny_config

torch.set_num_threads(1)


def kept_bytes(stages: list[PipelineStage], ids: torch.Tensor, integers: torch.Tensor) -> int:
    """Bytes that autograd keeps on the device after a forward pass of the first stage."""
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    parameters = {p.untyped_storage().data_ptr() for p in stages[0].parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = stages[0]((ids, integers))
    size = sum(size for pointer, size in storages.items() if pointer not in parameters)
    del output
    return size


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mixtral", "gpt2", "qwen3_next"])
@pytest.mark.parametrize(
    ("options", "units"),
    [
        ({"interval": 1}, 6),
        ({"interval": 2}, 3),
        ({"interval": 4}, 2),
        ({"attention_only": True}, 6),
        ({"interval": 2, "offload": True}, 3),
    ],
)
def test_equal_losses(family: str, options: dict[str, int], units: int, tmp_path: Path) -> None:
    if family == "qwen3_next" and "attention_only" in options:
        pytest.skip("three of four layers have linear attention only")
    layers = 8
    make_folder(tiny_config(family, num_hidden_layers=layers), tmp_path)
    ids, integers = packed_batch(96)
    boundaries = [0, 6, layers]
    expected = chained_loss_and_gradients(load_chain(tmp_path, boundaries), ids, integers)
    stages = load_chain(tmp_path, boundaries)
    states = [checkpoint_activations(stage.model, stage.span, **options) for stage in stages]
    found = chained_loss_and_gradients(stages, ids, integers)
    assert torch.equal(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-5)
    assert states[0].units == units
    assert [state.recomputed for state in states] == [state.units for state in states]
    if options.get("offload"):
        hidden = ids.numel() * 32 * 4
        assert states[0].offloaded_bytes == states[0].units * hidden


def test_memory_and_the_switch(tmp_path: Path) -> None:
    make_folder(tiny_config("llama", num_hidden_layers=8), tmp_path)
    ids, integers = packed_batch(96)
    plain = kept_bytes(load_chain(tmp_path, [0, 6, 8]), ids, integers)
    kept = {}
    for interval in (1, 3):
        stages = load_chain(tmp_path, [0, 6, 8])
        state = checkpoint_activations(stages[0].model, stages[0].span, interval=interval)
        kept[interval] = kept_bytes(stages, ids, integers)
        state.is_enabled = False
        assert kept_bytes(stages, ids, integers) == plain
        with torch.no_grad():
            stages[0]((ids, integers))
        assert state.recomputed == 0
    assert kept[3] < kept[1] < plain / 5


def test_mistakes(tmp_path: Path) -> None:
    make_folder(tiny_config("llama"), tmp_path)
    stage = load_chain(tmp_path, [0, 4])[0]
    with pytest.raises(UserError, match="at least 1"):
        checkpoint_activations(stage.model, stage.span, interval=0)
