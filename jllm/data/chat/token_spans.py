"""Which tokens of a text lie in spans that are given in bytes of it.

A table of the length of every token says where each one lies, for texts that the tokenizer does not change
(`jllm.data.tokenizer.lengths`); for others the reference engine's offsets decide.

A token is in a span when any byte of it is, as in transformers.

Cost: numpy over all texts of a chunk; no Python object for a token.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jllm.data.dataset.columns import Int32, Int64
from jllm.data.tokenizer import fast_json
from jllm.data.tokenizer.backend import marks_first_segment
from jllm.data.tokenizer.checked_engine import CheckedEngine
from jllm.data.tokenizer.facts import TokenizerFacts
from jllm.data.tokenizer.lengths import unchanged


def _bytes_of(token: str) -> int:
    """The bytes of text that a token of a tokenizer without byte-level letters stands for."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return 1
    return len(token.replace("▁", " ").encode())


class TokenLengths:
    """How many bytes of text each token stands for, from the vocabulary of the serialised backend."""

    def __init__(self, facts: TokenizerFacts) -> None:
        value: dict[str, Any] = fast_json.loads(facts.backend) if facts.backend else {"model": {"vocab": {}}}
        vocabulary = value["model"].get("vocab", {})
        if not isinstance(vocabulary, dict):  # Unigram: a list of pairs
            vocabulary = {token: index for index, (token, _) in enumerate(vocabulary)}
        outside = {key: item for key, item in value.items() if key not in ("model", "added_tokens")}
        byte_level = "ByteLevel" in json.dumps(outside)
        self.lengths = np.zeros(max([facts.vocab_size, *(index + 1 for index in vocabulary.values())]), dtype=np.int32)
        sizes = map(len if byte_level else _bytes_of, vocabulary)
        self.lengths[list(vocabulary.values())] = list(sizes)
        self._unchanged = unchanged(value)
        self.marks_words = not byte_level
        """Whether the tokenizer puts a "▁" before a text that does not start with one."""
        self.marks_first = marks_first_segment(facts.pre_tokenizer)
        """Whether it does so for the first segment of a conversation only."""

    def tokens_of_spans(
        self, engine: CheckedEngine, texts: Sequence[str], ids: Int32, offsets: Int64, spans: Int64
    ) -> NDArray[np.bool_]:
        """Which tokens overlap a span; `offsets` are those of the texts in `ids`."""
        chosen = np.zeros(len(ids) + 1, dtype=np.int32)
        if len(spans) == 0:
            return chosen[:-1].astype(bool)
        ends = np.zeros(len(ids) + 1, dtype=np.int64)
        np.cumsum(self.lengths.take(ids), out=ends[1:], dtype=np.int64)
        number, start, end = spans.T
        base, limit = ends[offsets[number]], ends[offsets[number + 1]]
        unique = number[np.flatnonzero(np.diff(number, prepend=-1))]  # spans are in the order of their texts
        found = [texts[i] for i in unique.tolist()]
        is_ascii = [text.isascii() for text in found]
        size = np.array(
            [len(text) if alone else len(text.encode()) for text, alone in zip(found, is_ascii, strict=True)]
        )
        extra = (ends[offsets[unique + 1]] - ends[offsets[unique]]) - size
        allowed = np.zeros(len(unique), dtype=np.int64)
        if self.marks_words:
            allowed = np.array([not text.startswith((" ", "▁")) for text in found], dtype=np.int64)
        plain = np.zeros(len(found), dtype=bool)
        if self._unchanged is not None:
            plain[:] = [alone or self._unchanged(text) for text, alone in zip(found, is_ascii, strict=True)]
        fits = plain & ((extra == 0) | (extra == allowed))
        where = np.searchsorted(unique, number)
        shift = extra[where]
        good = fits[where]
        # The mark in front belongs to the first byte of the text.
        first = np.searchsorted(ends[1:], base + np.where(start > 0, start + shift, 0), side="right")
        last = np.searchsorted(ends[:-1], np.minimum(base + end + shift, limit), side="left")
        np.add.at(chosen, first[good], 1)
        np.add.at(chosen, last[good], -1)
        mask = np.cumsum(chosen[:-1]) > 0
        for index in np.flatnonzero(~good).tolist():
            i = int(number[index])
            low = int(offsets[i])
            bounds = int(start[index]), int(end[index])
            for begin, stop in engine.tokens_of_bytes(texts[i], *bounds, marks_first=self.marks_first):
                mask[low + begin : low + stop] = True
        return mask
