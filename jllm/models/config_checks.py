"""What a `config.json` says that no model can be, found before one is built.

transformers checks the types of most fields when it reads a configuration, and hardly any sizes: heads that do not
divide fail in the first forward pass, minutes into a run. Only what is wrong for every family is refused here; what a
family alone needs is found when it is built without memory (`jllm.models.pipeline.costs`).

Cost: none to speak of.
"""

import math
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from jllm.errors import UserError
from jllm.models.dropout import dropout_of

SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
"""Whole numbers from 1 on, where a configuration has them; some families have a list of them, one a layer."""


def check_config(config: PretrainedConfig, path: Path) -> None:
    """Refuse sizes below 1, heads that do not divide, and dropout that is no share.

    Raises:
        UserError: as said; `path` is the file, for the message.
    """
    text = config.get_text_config(decoder=True)
    sizes = {name: _field(text, name) for name in SIZES}
    for name, value in sizes.items():
        for number in value if isinstance(value, list | tuple) else (value,):
            if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
                raise UserError(f"{path}: {name} is {number!r}; it must be a whole number from 1 on")
    heads, shared, hidden = sizes["num_attention_heads"], sizes["num_key_value_heads"], sizes["hidden_size"]
    if isinstance(heads, int) and isinstance(shared, int) and heads % shared:
        raise UserError(
            f"{path}: num_attention_heads {heads} is not a multiple of num_key_value_heads {shared}, which attention"
            " shares among them; give the published file"
        )
    if isinstance(heads, int) and isinstance(hidden, int) and sizes["head_dim"] is None and hidden % heads:
        raise UserError(
            f"{path}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}, and no head_dim is given;"
            " give the published file"
        )
    for name, rate in dropout_of(config).items():
        if not (math.isfinite(rate) and 0 <= rate < 1):
            raise UserError(f"{path}: {name} is {rate}; dropout is at least 0 and below 1")


def _field(config: PretrainedConfig, name: str) -> Any:
    """A field; None where there is none, or where it depends on the layer."""
    try:
        return getattr(config, name, None)
    except (ValueError, TypeError, RuntimeError):
        return None
