"""Recomputing or offloading activations changes memory, never the loss or a gradient."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from jllm.errors import UserError
from jllm.models.activation_checkpointing import checkpoint_activations
from jllm.models.pipeline.stage import PipelineStage
from tests.models.chain import chained_loss_and_gradients, load_chain, packed_batch
from tests.models.family_check import make_folder
from tests.models.tiny import tiny_config

torch.set_num_threads(1)
SIZE = float(os.environ.get("JLLM_TEST_SIZE", "1"))


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


WAYS: dict[str, tuple[dict[str, Any], int]] = {
    "each layer": ({"interval": 1}, 4),
    "pairs": ({"interval": 2}, 2),
    "uneven groups": ({"interval": 3}, 2),
    "attention": ({"attention_only": True}, 4),
    "attention offloaded": ({"attention_only": True, "offload": True}, 4),
    "offloaded": ({"interval": 2, "offload": True}, 2),
}
# Every way with one family, and the others with the way that is hardest for them; all pairs from size 2 on.
OTHERS = [("gemma3_text", "pairs"), ("mixtral", "attention"), ("gpt2", "offloaded"), ("qwen3_next", "uneven groups")]
SOME = [("llama", way) for way in WAYS] + OTHERS
ALL = [(family, way) for family in ("llama", *dict(OTHERS)) for way in WAYS]
# Three of four layers of Qwen3-Next have linear attention only.
CASES = SOME if SIZE < 2 else [case for case in ALL if case[0] != "qwen3_next" or "attention" not in case[1]]


@pytest.mark.parametrize(("family", "way"), CASES)
def test_equal_losses(family: str, way: str, tmp_path: Path) -> None:
    """`units` counts those of the first stage, which has four of five layers."""
    options, units = WAYS[way]
    make_folder(tiny_config(family, num_hidden_layers=5), tmp_path)
    ids, integers = packed_batch(96)
    boundaries = [0, 4, 5]
    stages = load_chain(tmp_path, boundaries)
    expected = chained_loss_and_gradients(stages, ids, integers)
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


# Their layers return tuples (openai-gpt: lists), which the loop indexes or unpacks.
TUPLES = (
    *("bloom", "codegen", "falcon", "gpt_neo", "gpt_neox_japanese", "gptj", "megatron-bert", "mpt", "openai-gpt"),
    *("rembert", "rwkv", "trocr", "bamba", "xlstm"),
)
# What their tuple holds beside the hidden state is what the next layer needs.
HANDING_ON = ("glm_moe_dsa", "hy_v4")
SHARED = {"index_topk": 4, "indexer_types": ["full", "shared", "shared", "full"]}


def assert_equal_checkpointed(
    folder: Path, boundaries: list[int], ways: list[dict[str, Any]], units: list[list[int]], *, packed: bool
) -> None:
    """Each of `ways` gives the loss and gradients of the same stages without it; `units` are those of the stages."""
    ids, integers = packed_batch(96, packed=packed)
    expected = chained_loss_and_gradients(load_chain(folder, boundaries), ids, integers)
    for options, counts in zip(ways, units, strict=True):
        stages = load_chain(folder, boundaries)
        states = [checkpoint_activations(stage.model, stage.span, **options) for stage in stages]
        found = chained_loss_and_gradients(stages, ids, integers)
        torch.testing.assert_close(found[0], expected[0], atol=0, rtol=0)
        assert found[1].keys() == expected[1].keys()
        for name, gradient in expected[1].items():
            torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-5)
        assert [state.units for state in states] == counts
        assert [state.recomputed for state in states] == counts


@pytest.mark.parametrize("family", TUPLES + HANDING_ON)
def test_groups_of_layers_that_return_tuples(family: str, tmp_path: Path) -> None:
    make_folder(tiny_config(family, **(SHARED if family in HANDING_ON else {})), tmp_path)
    ways = [{"interval": interval} for interval in (1, 2, 3)]
    assert_equal_checkpointed(tmp_path, [0, 3, 4], ways, [[3, 1], [2, 1], [1, 1]], packed=False)


def test_a_loop_that_changes_the_hidden_state_is_noticed(tmp_path: Path) -> None:
    make_folder(tiny_config("rwkv", rescale_every=1), tmp_path)
    stage = load_chain(tmp_path, [0, 4])[0]
    stage.eval()  # then the family halves the hidden state after each layer
    checkpoint_activations(stage.model, stage.span, interval=2)
    with pytest.raises(AssertionError, match="changes the hidden state"):
        stage(packed_batch(96, packed=False))


# Attentions of the stages of layers 0 to 2 and of layer 3.
HYBRIDS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "qwen3_next": ({}, [0, 1]),
    "nemotron_h": ({}, [1, 0]),
    "bamba": ({"attn_layer_indices": [3]}, [0, 1]),
    "longcat_flash": ({}, [6, 2]),
}


@pytest.mark.parametrize("family", HYBRIDS)
def test_a_stage_without_attention_recomputes_nothing(family: str, tmp_path: Path) -> None:
    overrides, units = HYBRIDS[family]
    make_folder(tiny_config(family, **overrides), tmp_path)
    assert_equal_checkpointed(tmp_path, [0, 3, 4], [{"attention_only": True}], [units], packed=False)


@pytest.mark.parametrize("boundaries", [[0, 4], [0, 3, 4]])
def test_a_model_without_attention_is_refused_on_every_stage(boundaries: list[int], tmp_path: Path) -> None:
    make_folder(tiny_config("mamba"), tmp_path)
    for stage in load_chain(tmp_path, boundaries):
        with pytest.raises(UserError, match="'mamba' has no attention module to recompute; give an interval"):
            checkpoint_activations(stage.model, stage.span, attention_only=True)


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
