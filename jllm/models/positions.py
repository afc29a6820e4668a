"""How long a row may be for a model's positions.

Rotary positions go on for ever, though a model has seen none beyond its `max_position_embeddings`. Learned positions
are a table: a row that is longer, padding included, reads beyond its end, which is an error on CPU and ends the process
on a GPU.

Cost: a model without rotary positions is built without memory (meta device), some milliseconds per layer.
"""

import re

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

_NAME = re.compile(r"(.*\.)?(w?[pt]?pe|.*pos(ition)?s?(_.*|emb.*)?|.*_positions?)", re.IGNORECASE)
SPARE_ENTRIES = 8
"""Some families start to count behind a few entries (OPT: 2)."""


def rotary_positions(config: PretrainedConfig) -> int | None:
    """The positions that a model with rotary embeddings was made for; None where it has none, or does not say."""
    text = config.get_text_config(decoder=True)
    most = getattr(text, "max_position_embeddings", None)
    return most if getattr(text, "rope_parameters", None) and isinstance(most, int) else None


def learned_positions(model: PreTrainedModel) -> int | None:
    """How many positions the tables of a model have, the smallest one; None where it has no tables.

    A table is an embedding, or a buffer that the family fills once, whose name says positions and whose length is what
    the configuration says, or a little more. Tables that grow when they are asked for more are none.
    """
    most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if not isinstance(most, int):
        return None
    tokens = model.get_input_embeddings()
    for name, module in model.named_modules():
        if module is tokens or hasattr(module, "make_weights"):
            continue
        lengths = [module.num_embeddings] if isinstance(module, nn.Embedding) and _NAME.fullmatch(name) else []
        for own, buffer in module.named_buffers(recurse=False):
            if buffer.ndim == 2 and buffer.is_floating_point() and _NAME.fullmatch(own):
                lengths.append(len(buffer))
        if any(most <= length <= most + SPARE_ENTRIES for length in lengths):
            return most
    return None
