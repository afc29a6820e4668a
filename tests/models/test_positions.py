"""A table of positions is found and counted, whatever a family calls it; rotary positions are none."""

import pytest
import torch

from jllm.models.positions import learned_positions, rotary_positions
from jllm.models.weights.source import bare_model, causal_class
from tests.models.tiny import tiny_config

LEARNED = ("gpt2", "gpt_neo", "gpt_bigcode", "opt", "biogpt", "gptj", "codegen")
WITHOUT = ("llama", "bloom", "mamba", "qwen3", "xglm", "mpt")


@pytest.mark.parametrize("model_type", [*LEARNED, *WITHOUT])
def test_tables(model_type: str) -> None:
    config = tiny_config(model_type)
    family = causal_class(config)
    found = learned_positions(bare_model(config, family, dtype=torch.float32))
    assert found == (config.max_position_embeddings if model_type in LEARNED else None)


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "biogpt", "gptj"])
def test_one_position_more_fails(model_type: str) -> None:
    """What the table is said to have works, and one more does not: else the start would refuse what can be trained."""
    config = tiny_config(model_type)
    model = causal_class(config)(config).eval()
    most = config.max_position_embeddings
    model(input_ids=torch.zeros(1, most, dtype=torch.long), use_cache=False)
    positions = torch.arange(most + 1)[None]
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.zeros(1, most + 1, dtype=torch.long), position_ids=positions, use_cache=False)


def test_rotary() -> None:
    assert rotary_positions(tiny_config("llama")) == tiny_config("llama").max_position_embeddings
    assert rotary_positions(tiny_config("gpt2")) is None
