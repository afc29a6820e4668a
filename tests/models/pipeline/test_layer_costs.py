"""What a layer costs for a token: products counted by hand, chosen experts alone, slices of what is cut."""

import pytest
import torch
from torch import nn

from jllm.models.pipeline.layer_costs import (
    activation_bytes_per_token,
    attention_operations,
    in_one_part,
    parts_of_attention,
    unpacked,
    weights_used,
)
from jllm.models.weights.source import bare_model, causal_class
from tests.models.tiny import tiny_config


def layer_of(family: str) -> nn.Module:
    config = tiny_config(family)
    layer = bare_model(config, causal_class(config), dtype=torch.float32).get_submodule("model.layers.0")
    assert isinstance(layer, nn.Module)
    return layer


ATTENTION, MLP = 32 * 32 * 2 + 2 * 32 * 16, 3 * 32 * 48


def test_weights_of_a_dense_layer() -> None:
    layer, config = layer_of("llama"), tiny_config("llama")
    assert weights_used(layer, config, in_one_part) == ATTENTION + MLP
    of_mlp = {id(each) for name, each in layer.named_parameters() if name.startswith("mlp")}
    assert weights_used(layer, config, in_one_part, of_mlp) == MLP
    assert weights_used(layer, config, lambda each: 2 if id(each) in of_mlp else 1) == ATTENTION + MLP / 2
    assert parts_of_attention(layer, lambda each: 2 if id(each) in of_mlp else 1) == 1
    assert parts_of_attention(layer, lambda each: 4) == 4


def test_experts_count_as_far_as_they_are_chosen() -> None:
    """2 of 4, and the router."""
    assert weights_used(layer_of("mixtral"), tiny_config("mixtral"), in_one_part) == ATTENTION + 2 * MLP + 4 * 32


def test_scores() -> None:
    config = tiny_config("gemma2", sliding_window=8)
    assert attention_operations(config, "full_attention", 64) == 4 * 32 * 4 * 8
    assert attention_operations(config, "sliding_attention", 64) == 4 * 8 * 4 * 8


def test_bytes_of_slices() -> None:
    """What leads back to the hidden state has slices of its input, the others of their output; norms are whole."""
    layer, config = layer_of("llama"), tiny_config("llama")
    by_hand = (32 + 16 + 16 + 32 * 3) + (32 + 32) + (48 + 48 + 2 * 32) + (48 + 32)
    norms = 2 * 32 * (4 + 4)
    assert activation_bytes_per_token(layer, config, 4, 1.0, in_one_part) == 4 * by_hand + norms
    halved = (16 + 8 + 8 + 32 * 3) + (16 + 32) + (24 + 24 + 2 * 32) + (24 + 32)
    assert activation_bytes_per_token(layer, config, 4, 1.0, lambda each: 2) == 4 * halved + norms
    once = halved - 2 * 32 - 32  # compiled layers keep what several products read once, and no norms
    assert activation_bytes_per_token(layer, config, 4, 0.0, lambda each: 2) == 4 * once


def test_bytes_between_attention_and_mlp() -> None:
    """What leads back to the hidden state, and norms, are of each slice's own tokens."""
    layer, config = layer_of("llama"), tiny_config("llama")
    whole, shared = (
        activation_bytes_per_token(layer, config, 4, 1.0, lambda each: 2, between=between) for between in (1, 2)
    )
    assert whole - shared == 4 * 2 * 32 / 2 + 2 * 32 * (4 + 4) / 2


def test_bytes_beside_frozen_maps() -> None:
    """Their inputs are kept for adapters alone; these keep what is between their maps."""
    pytest.importorskip("peft", reason="peft is not installed: pip install .[adapters]")
    from jllm.models.adapters.lora import attach_lora
    from jllm.models.adapters.lora_plan import LoraChoice, plan_lora

    config = tiny_config("llama")
    family = causal_class(config)
    outputs = (32 + 16 + 16) + 32 + (48 + 48) + 32

    def kept(targets: str | None, share_of_norms: float = 0.0) -> float:
        model = bare_model(config, family, dtype=torch.float32)
        if targets is not None:
            plan = plan_lora(config, family, LoraChoice(rank=4, alpha=4, targets=targets))
            attach_lora(model, plan, seed=0, dtype=torch.float32)
        trains = {id(each) for name, each in model.named_parameters() if "lora_" in name}
        layer = model.get_submodule("model.layers.0")
        return activation_bytes_per_token(layer, config, 4, share_of_norms, in_one_part, trained=trains) / 4

    assert kept(None) == outputs
    assert kept("q_proj,v_proj") == outputs + 32 + 2 * 4
    assert kept("all-linear") == outputs + (32 + 32) + (32 + 48) + 7 * 4
    norms = 2 * 32 * (4 + 4) / 4
    assert kept("q_proj,v_proj", 1.0) == outputs + 2 * 32 + 2 * 4 + norms


def test_packed_experts_in_few_bits() -> None:
    layer = layer_of("mixtral")
    experts = {id(each) for each in layer.parameters() if each.ndim == 3}
    assert unpacked(layer, experts) == 4 * MLP
    assert unpacked(layer, set()) == 0
