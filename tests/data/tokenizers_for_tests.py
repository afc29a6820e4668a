"""Tokenizers that tests can make on the spot, and the real ones where they were fetched."""

import base64
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


def make_byte_tokenizer(folder: Path, *, more: Sequence[Any] = (), **config: object) -> Path:
    """A byte-level BPE tokenizer like Qwen's: NFC, no BOS, chat control tokens, and added tokens that are not
    special; `more` are further `tokenizers.AddedToken`s."""
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
    tokenizer.add_tokens(list(more))
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


def make_sentencepiece_folder(folder: Path) -> Path:
    """A folder with a sentencepiece model and no tokenizer.json, as old Llama folders are."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder.mkdir(parents=True, exist_ok=True)
    lines = [line for text in CORPUS for line in text.splitlines()]
    with (folder / "tokenizer.model").open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, vocab_size=400, model_type="bpe", byte_fallback=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
    values = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**values, "add_bos_token": True}))
    return folder


TIKTOKEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def make_tiktoken_folder(folder: Path) -> dict[bytes, int]:
    """A folder with a tiktoken vocabulary and no tokenizer.json, as Llama 3 was first published; its tokens' ranks."""
    pytest.importorskip("tiktoken")
    folder.mkdir(parents=True, exist_ok=True)
    tokens = [bytes([value]) for value in range(256)]
    for word in ("the", " the", "quick", " world", "def", "  ", "tion", " call"):
        tokens += [word.encode()[:end] for end in range(2, len(word) + 1)]
    ranks = {token: rank for rank, token in enumerate(dict.fromkeys(tokens))}
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    (folder / "tokenizer.model").write_text("".join(lines))
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end_of_text|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return ranks


def make_slow_folder(folder: Path) -> Path:
    """A tokenizer that exists as Python code alone: bytes, behind three special ids."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
    return folder


def save(tokenizer: Any, folder: Path, **config: Any) -> Path:
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return folder


def sentencepiece_like(folder: Path, scheme: str, *, split: bool = False) -> Path:
    """A BPE tokenizer with byte fallback and a Metaspace pre-tokenizer, as transformers makes of Llama 2."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors, trainers

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    alphabet = [chr(code) for code in range(33, 127)]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator(CORPUS, trainer)
    value = json.loads(trained.to_str())
    value["model"].update(byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    value["added_tokens"] = value["added_tokens"][:3]
    value["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split}
    tokenizer = Tokenizer.from_str(json.dumps(value))
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in ("<unk>", "<s>", "</s>")]
    )
    start = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    return save(tokenizer, folder, bos_token="<s>", unk_token="<unk>")
