"""What no model can be is refused with the file and the field; what families are is not."""

from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, LlamaConfig

from jllm.errors import UserError
from jllm.models.config_checks import check_config
from jllm.models.families import NAMED
from tests.models.tiny import tiny_config

PATH = Path("m/config.json")


@pytest.mark.parametrize("model_type", [*NAMED, "gpt2", "opt", "gemma4_text"])
def test_families_are_let_through(model_type: str) -> None:
    check_config(tiny_config(model_type), PATH)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0; it must be a whole number from 1 on"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"hidden_size": 30, "head_dim": None}, "hidden_size 30 is not a multiple of num_attention_heads 4"),
        ({"attention_dropout": float("nan")}, "attention_dropout is nan"),
        ({"attention_dropout": 1}, "attention_dropout is 1"),
    ],
)
def test_what_no_model_can_be(fields: dict[str, Any], said: str) -> None:
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2)
    vars(config).update(fields)  # as a family would that checks nothing by itself
    with pytest.raises(UserError, match=f"^m/config.json: {said}"):
        check_config(config, PATH)


def test_head_sizes_of_their_own_need_not_divide() -> None:
    check_config(LlamaConfig(hidden_size=48, num_attention_heads=4, num_key_value_heads=4, head_dim=20), PATH)


def test_names_of_older_families_count() -> None:
    config = GPT2Config(n_embd=30, n_head=4)
    with pytest.raises(UserError, match="hidden_size 30 is not a multiple of num_attention_heads 4"):
        check_config(config, PATH)
