"""What a `config.json` says that no model can be, found before one is built.

transformers checks the types of most fields when it reads a configuration, and hardly any sizes: heads that do not
divide fail in the first forward pass, minutes into a run. Only what is wrong for every family is refused here; what a
family alone needs is found when it is built without memory (`jllm.models.pipeline.costs`).

Sizes that would take memory or hours before anything else is looked at are refused before transformers reads the
configuration, which makes lists of as many entries as there are layers.

Cost: none to speak of.
"""

import math
import re
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from jllm.errors import UserError
from jllm.models.dropout import dropout_of

SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
"""Whole numbers from 1 on, where a configuration has them; some families have a list of them, one a layer."""


MOST_LAYERS = 4096
LARGEST_SIZE = 1 << 31
"""Of any other whole number that is a size: vocabularies have some hundred thousand entries."""
MOST_ENTRIES, DEEPEST = 1 << 20, 32
_OF_LAYERS = re.compile(r"(?:^|_)n?_?layers?$")
_OF_SIZES = re.compile(r"size|dim|head|expert|layer|width|inner|embd|channels|positions|groups|rank|window|kernel")


def check_raw_config(raw: dict[str, Any], path: Path) -> None:
    """Refuse numbers that no model has, anywhere in a `config.json`, and values without end.

    Raises:
        UserError: as said; `path` is the file, for the message.
    """
    entries = 0
    pending: list[tuple[str, Any, int]] = [("", raw, 0)]
    while pending:
        name, value, depth = pending.pop()
        entries += 1
        if depth > DEEPEST or entries > MOST_ENTRIES:
            raise UserError(f"{path}: has more in it than any configuration; give the file that was published")
        if isinstance(value, dict):
            pending += [(str(key), item, depth + 1) for key, item in value.items()]
        elif isinstance(value, list):
            pending += [(name, item, depth + 1) for item in value]
        elif isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{path}: {name} is {value}; it must be a finite number")
        elif isinstance(value, int | float):
            most = MOST_LAYERS if _OF_LAYERS.search(name) else LARGEST_SIZE if _OF_SIZES.search(name) else None
            if most is not None and value > most:
                shown = f"{value:,}" if value < 1e18 else "far more"
                raise UserError(f"{path}: {name} is {shown}; at most {most:,} is built")


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
