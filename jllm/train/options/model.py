"""Options of the trainer: the model that is trained, and which of its parameters train."""

import dataclasses
from pathlib import Path

from jllm.options import option


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The model that is trained, and which of its parameters train."""

    model: Path | None = option(
        None,
        "-m",
        group="Model",
        may_differ=True,
        help="Hugging Face folder of the model: configuration, weights, tokenizer",
    )
    init: bool = option(False, help="start from random weights made from the model's configuration")
    trust_remote_code: bool = option(False, help="run model code that comes with the folder")
    attn_implementation: str = option(
        "auto",
        help="attention kernel: auto, varlen, flash_attention_2, flash_attention_3, flash_attention_4, flex_attention,"
        " sdpa, eager",
    )
    dropout: float | None = option(
        None,
        most=1,
        below_most=True,
        help="dropout instead of that of the model's configuration, where that has one above 0; 0: none"
        " [default: what the configuration says]",
    )
    neftune_alpha: float | None = option(
        None,
        most=10**6,
        above_least=True,
        help="noise on embeddings while training (NEFTune): uniform, up to this over the root of row length x width",
    )
    force_tokenizer: bool = option(
        False, help="train although the data was made with another tokenizer than the model's"
    )
    check_weights: bool = option(
        False, help="with --dry_run: read all weights of --model, and refuse what is not finite, as a run does"
    )
    target_modules: str | None = option(None, help="train only parameters whose name matches these patterns, by commas")
    frozen_modules: str | None = option(None, help="freeze parameters whose name matches these patterns, by commas")
    layers_to_transform: str | None = option(None, help='of the decoder layers, train only these: "0:7,24:31"')
