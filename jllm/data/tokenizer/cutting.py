"""Long texts encoded in pieces, where that gives the ids of the whole.

An engine that is given a text of hundreds of MB holds some times as much while it works. Byte-level BPE gives the same
ids for pieces that end with a line end behind a printable ASCII character, if the next begins with an ASCII letter and

* no token of the vocabulary goes over such a place, so that no merge does;
* the patterns that split a text look only forward, so that what is behind a place does not change what follows;
* no normalisation, and no added token, sees more than its own characters.

Patterns are not understood any further than that. So each place is looked at before it is used: what is near it must
have the same ids whole and in two.

Guarantees: the ids of the whole text; tokenizers of other kinds, and texts without such places, are encoded whole.
Cost: the vocabulary is read once, when the first long text comes; a piece and its ids beside all ids, in place of the
text in Python, in UTF-8, and split.
"""

import contextlib
import mmap
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from jllm.data.dataset.columns import Int32, Int64
from jllm.data.sources.long_texts import LONG, LongText, pieces_of
from jllm.data.tokenizer import fast_json

Encode = Callable[[list[str]], tuple[Int32, Int64]]

NEAR = 1024
"""Characters on either side of a place that are looked at."""
_LARGE_PAGE = 2 << 20
_NORMALISERS = ("NFC", "NFD", "NFKC", "NFKD", "Lowercase")
_LINE_END = "Ċ"
"""In the alphabet of byte-level vocabularies."""
_OVER_A_PLACE = re.compile(f"[!-~]{_LINE_END}[A-Za-z]|^{_LINE_END}[A-Za-z]")
_LOOKS_BACK = re.compile(r"\(\?<[=!]|\\[bBAGZzK]|\$|(?<!\[)(?<!\\)\^")


def can_be_cut(backend: str) -> bool:
    """Whether long texts have the ids of their pieces, by a serialised backend.

    Args:
        backend: the text of a `tokenizer.json`.
    """
    value = fast_json.loads(backend)
    model = value["model"]
    whole = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk")
    if model.get("type") != "BPE" or any(model.get(name) for name in whole):
        return False
    if any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in value["added_tokens"]):
        return False
    if any(re.search(r"\n[A-Za-z]", token["content"]) for token in value["added_tokens"]):
        return False
    if any(step["type"] not in _NORMALISERS for step in _steps(value.get("normalizer"), "normalizers")):
        return False
    splits = _steps(value.get("pre_tokenizer"), "pretokenizers")
    if not any(step["type"] == "ByteLevel" for step in splits) or not all(map(_looks_forward, splits)):
        return False
    return not any(_OVER_A_PLACE.search(token) for token in model["vocab"])


def encode_long(texts: Iterable[str | LongText], encode: Encode) -> tuple[Int32, Int64]:
    """Ids of texts one after the other, and where each begins, like an engine's; one piece at a time.

    Args:
        texts: that may be cut.
        encode: an engine's.
    """
    ids = _Grown()
    offsets = [0]
    for text in texts:
        pieces = pieces_of(text) if isinstance(text, str) else iter(text)
        for piece in _apart(pieces, encode):
            ids.extend(encode([piece])[0])
        offsets.append(ids.length)
    return ids.taken(), np.array(offsets, dtype=np.int64)


def is_long(text: str | LongText) -> bool:
    """Whether a text is worth cutting."""
    return isinstance(text, LongText) or len(text) > LONG


def _apart(pieces: Iterator[str], encode: Encode) -> Iterator[str]:
    """The pieces, put together again where what is near a place has other ids in two."""
    held = next(pieces)
    for piece in pieces:
        before, after = held[-NEAR:], piece[:NEAR]
        whole, _ = encode([before + after])
        parts, _ = encode([before, after])
        if np.array_equal(whole, parts):
            yield held
            held = piece
        else:
            held += piece
    yield held


def _steps(value: dict[str, Any] | None, of: str) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as the list of its steps."""
    if value is None:
        return []
    return [step for each in value[of] for step in _steps(each, of)] if value["type"] == "Sequence" else [value]


def _looks_forward(step: dict[str, Any]) -> bool:
    if step["type"] == "ByteLevel":
        return not step.get("add_prefix_space")
    if step["type"] == "Digits":
        return True
    if step["type"] != "Split":
        return False
    pattern = step["pattern"]
    return "String" in pattern or not _LOOKS_BACK.search(pattern.get("Regex", "$"))


class _Grown:
    """An array that grows in place: the system moves its pages, which are large ones where it has such, and nothing is
    copied."""

    def __init__(self) -> None:
        self.length = 0
        self._room = mmap.mmap(-1, _LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def extend(self, ids: Int32) -> None:
        end = self.length + len(ids)
        if 4 * end > len(self._room):
            self._room.resize(-(-max(4 * end, len(self._room) * 5 // 4) // _LARGE_PAGE) * _LARGE_PAGE)
            with contextlib.suppress(OSError):  # a system without them
                self._room.madvise(mmap.MADV_HUGEPAGE)
        np.frombuffer(self._room, dtype=np.int32)[self.length : end] = ids
        self.length = end

    def taken(self) -> Int32:
        return np.frombuffer(self._room, dtype=np.int32, count=self.length)
