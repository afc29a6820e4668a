"""Engines: text to ids.

The reference is Hugging Face `tokenizers` running the backend that AutoTokenizer made (`jllm.data.tokenizer.facts`);
the fast engine is fastokens. A tokenizer without a backend is run by AutoTokenizer itself.

No Python object per token exists on the fast path: the engine's buffers become numpy arrays without a copy.

Cost: a second and some hundred MB for a large vocabulary; the reference and the fast engine release the interpreter
lock while they encode, so threads of one process share the tables.
"""

import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from jllm.data.tokenizer.backend import as_inert, for_fastokens, rewritten, with_short_merges
from jllm.data.tokenizer.facts import TokenizerFacts, auto_tokenizer, without_notices

if TYPE_CHECKING:  # importing Arrow would be waited for by engines that are begun at once
    from jllm.data.dataset.columns import Int32, Int64

os.environ["FASTOKENS_BPE_THREADS"] = "1"
"""fastokens reads it when it first encodes. A text is encoded by the thread that asks for it: threads of its own would
spin while they wait, and would not be there in a forked process."""


class TokenizerEngine(Protocol):
    """Encodes texts to one flat array of ids and the offsets of each text in it."""

    name: str
    version: str

    def encode(self, texts: list[str], *, parse_special: bool = False) -> "tuple[Int32, Int64]":
        """Ids of all texts, without the tokenizer's prefix and suffix.

        Args:
            texts: anything that is valid UTF-8.
            parse_special: special tokens inside a text become their ids; otherwise they are ordinary text.
        """
        ...


class ReferenceEngine:
    """Hugging Face `tokenizers`.

    Args:
        backend: the serialised backend.
        inert: treat added tokens inside a text as ordinary text, the special ones and the others alike.
    """

    name = "hf"

    def __init__(self, backend: str, *, inert: bool = False) -> None:
        import tokenizers

        self.version = tokenizers.__version__
        self.inert = inert
        self._serialised = backend
        # An instance for each way of encoding, because that is a setting of the instance and threads share the engine.
        self._backends: dict[tuple[bool, bool], Any] = {}
        self._lock = threading.Lock()

    def _backend(self, inert: bool, parse_special: bool) -> Any:
        with self._lock:
            if (inert, parse_special) not in self._backends:
                import tokenizers

                text = rewritten(self._serialised, as_inert) if inert else self._serialised
                backend = tokenizers.Tokenizer.from_str(text)
                backend.no_truncation()
                backend.no_padding()
                backend.encode_special_tokens = not parse_special
                self._backends[inert, parse_special] = backend
            return self._backends[inert, parse_special]

    def load(self) -> None:
        """Load now what checking the fast engine needs, half a second for a large vocabulary, and not when the first
        text comes: whole conversations with their control tokens where `inert`, else ordinary text."""
        self._backend(False, parse_special=self.inert)

    def encode(self, texts: list[str], *, parse_special: bool = False) -> "tuple[Int32, Int64]":
        encodings = self._backend(self.inert, parse_special).encode_batch_fast(texts, add_special_tokens=False)
        return _flat([encoding.ids for encoding in encodings])

    def whole(self, text: str) -> "Int32":
        """Ids of a text in which all control tokens are parsed, as AutoTokenizer encodes a rendered conversation."""
        ids = self._backend(False, True).encode(text, add_special_tokens=False).ids
        return np.array(ids, dtype=np.int32)

    def token_spans(self, text: str, *, marks_first: bool = False) -> list[tuple[int, int]]:
        """The characters of the text that each of its tokens stands for.

        Args:
            marks_first: the tokenizer marks the first segment of a conversation, and no other one.
        """
        loaded = self._backends.get((False, True))
        if self.inert and loaded is not None and not marks_first:
            # What checks need serves too, and processes share it: where no added token was met, nothing was parsed.
            encoding = loaded.encode(text, add_special_tokens=False)
            if loaded.get_added_tokens_decoder().keys().isdisjoint(encoding.ids):
                found: list[tuple[int, int]] = encoding.offsets
                return found
        spans: list[tuple[int, int]] = self._backend(self.inert, False).encode(text, add_special_tokens=False).offsets
        return spans

    def forget(self) -> None:
        """Give the memory of the instances back; they are made again when they are needed."""
        self._backends.clear()


class SlowEngine:
    """A tokenizer that exists only as Python code (no fast backend): AutoTokenizer itself, one text at a time."""

    name = "hf"

    def __init__(self, facts: TokenizerFacts, *, trust_remote_code: bool = False) -> None:
        import transformers

        self.version = f"{transformers.__version__} (slow)"
        self._tokenizer = auto_tokenizer(facts.path, trust_remote_code=trust_remote_code)
        self._lock = threading.Lock()

    def encode(self, texts: list[str], *, parse_special: bool = False) -> "tuple[Int32, Int64]":
        with self._lock, without_notices():
            rows = [
                self._tokenizer(text, add_special_tokens=False, split_special_tokens=not parse_special).input_ids
                for text in texts
            ]
        return _flat(rows)


class FastEngine:
    """fastokens, built from the serialised backend; see `for_fastokens` for what is rewritten and why.

    Args:
        backend: the serialised backend.
        inert: as for the reference.
        before_building: is called when only the library has something left to do, which needs no interpreter lock.

    Raises:
        ValueError: fastokens cannot run this tokenizer; the message says why.
    """

    name = "fastokens"

    def __init__(
        self, backend: str, *, inert: bool = False, before_building: Callable[[], object] | None = None
    ) -> None:
        import importlib.metadata

        import fastokens

        self.version = importlib.metadata.version("fastokens")
        native: Any = fastokens._native
        changes = [as_inert, for_fastokens] if inert else [for_fastokens]
        text = with_short_merges(rewritten(backend, *changes))
        if before_building is not None:
            before_building()
        self._tokenizer = native.Tokenizer.from_json_str(text)

    def encode(self, texts: list[str], *, parse_special: bool = False) -> "tuple[Int32, Int64]":
        ids, offsets = self._tokenizer.encode_batch_flat(
            texts, add_special_tokens=False, split_special_tokens=not parse_special
        )
        return np.frombuffer(ids, dtype=np.int32), np.frombuffer(offsets, dtype=np.int64)


def use_cores(cores: int) -> None:
    """Limit the threads of the reference; takes effect before the first text is encoded in this process. One core means
    no thread beside the one that asks; where a user forbade them, none are made for more."""
    os.environ["RAYON_NUM_THREADS"] = str(cores)
    if cores == 1:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    else:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def _flat(rows: list[list[int]]) -> "tuple[Int32, Int64]":
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    ids = np.empty(offsets[-1], dtype=np.int32)
    for row, start in zip(rows, offsets, strict=False):
        ids[start : start + len(row)] = row
    return ids, offsets
