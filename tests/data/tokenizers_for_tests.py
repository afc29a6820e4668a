"""Tokenizers that tests can make on the spot, and the real ones where they were fetched."""

import json
import os
from pathlib import Path

import pytest

CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "def f(x):\n    return x + 1\n",
    "Hello, world! 1234567890",
    "naïve café déjà vu, 日本語 中文 한국어",
    "user assistant system tool call think answer question",
] * 20
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ADDED = ["<think>", "</think>", "<tool_call>", "</tool_call>"]


def make_byte_tokenizer(folder: Path, **config: object) -> Path:
    """A byte-level BPE tokenizer like Qwen's: NFC, no BOS, chat control tokens, and added tokens that are not
    special."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    tokenizer.add_tokens([tokenizers.AddedToken(text, special=False, normalized=False) for text in ADDED])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 100000,
        **config,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return folder


def asset_tokenizers() -> list[Path]:
    """The folders of real tokenizers below JLLM_ASSETS."""
    root = os.environ.get("JLLM_ASSETS")
    return sorted(path for path in Path(root, "tokenizers").glob("*") if path.is_dir()) if root else []


def asset_tokenizer(name: str) -> Path:
    """A real tokenizer, or a skipped test."""
    for path in asset_tokenizers():
        if path.name == name:
            return path
    pytest.skip(f"no {name} tokenizer: set JLLM_ASSETS to a folder with tokenizers/{name}")
