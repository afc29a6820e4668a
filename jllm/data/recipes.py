"""raw2ids from Python, without files: texts to documents of ids, and those to rows.

    from jllm.data.recipes import Raw2IdsConfig, encoder_of, load_tokenizer, open_engine, packer_of, rows_of_texts

    facts = load_tokenizer("models/Qwen3-8B")
    config = Raw2IdsConfig(input=(), tokenizer="models/Qwen3-8B", type="pretrain", stack=True)
    encoder = encoder_of(config, facts, open_engine(facts))
    rows = rows_of_texts(batches, encoder, packer_of(config, facts))

The names that are listed here are the interface; the modules that they come from may change.
"""

from jllm.data.prepare.config import Raw2IdsConfig
from jllm.data.prepare.recipes import packer_of, rows_of_texts
from jllm.data.prepare.recipes import pretrain_encoder as encoder_of
from jllm.data.tokenizer.checked_engine import open_engine
from jllm.data.tokenizer.facts import load_tokenizer

__all__ = ["Raw2IdsConfig", "encoder_of", "load_tokenizer", "open_engine", "packer_of", "rows_of_texts"]
