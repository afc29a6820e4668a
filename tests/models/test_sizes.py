"""Sizes by the names that configurations share."""

from transformers import GPT2Config, PretrainedConfig

from jllm.models.sizes import size_of, sizes_of
from tests.models.tiny import tiny_config


def test_one_number_for_all_layers() -> None:
    config = tiny_config("qwen3", num_key_value_heads=2)
    assert sizes_of(config, "num_key_value_heads") == [2]
    assert sizes_of(config, "no_such_size") == []
    assert size_of(config, "no_such_size") == 0
    assert size_of(GPT2Config(n_head=2), "num_attention_heads") == 2  # by the family's own name


def test_numbers_of_layers_of_their_own() -> None:
    """Configurations that refuse to be asked for what differs between layers are read as they are stored."""
    config = tiny_config("gemma4_text")
    assert size_of(config, "head_dim") == 8
    config = PretrainedConfig(intermediate_size=[48, 64, 48, 96])
    assert sizes_of(config, "intermediate_size") == [48, 64, 48, 96]
    assert size_of(config, "intermediate_size") == 96
