"""Which texts a tokenizer cuts up without changing a byte, so that the lengths of tokens say where each one lies."""

import unicodedata
from collections.abc import Callable
from typing import Any

_FORMS = ("NFC", "NFD", "NFKC", "NFKD")
_SPLITTERS = ("ByteLevel", "Digits", "Punctuation", "Metaspace", "UnicodeScripts", "Split", "Sequence")


def unchanged(backend: dict[str, Any]) -> Callable[[str], bool] | None:
    """A test of texts: whether the tokens of a text, end to end, are its bytes, but for a "▁" in place of a space and
    one more of them in front. Those of ASCII texts are; None where those of no text can be relied on.

    Args:
        backend: the parsed backend of a tokenizer; None is the answer to what is not known.
    """
    model = backend["model"]
    affix = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    if model.get("type") not in ("BPE", "Unigram", None) or affix or not _keeps_text(backend.get("pre_tokenizer")):
        return None
    forms: set[str] = set()
    for step in _steps(backend.get("normalizer"), "normalizers"):
        if step["type"] in _FORMS:
            forms.add(step["type"])
        elif not _marks_words(step):
            return None
    return lambda text: all(unicodedata.is_normalized(form, text) for form in forms)  # type: ignore[arg-type]


def _steps(value: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if value is None:
        return []
    if value["type"] == "Sequence":
        return [step for inner in value[key] for step in _steps(inner, key)]
    return [value]


def _marks_words(normalizer: dict[str, Any]) -> bool:
    """Whether it does nothing but write "▁" for spaces, or in front."""
    if normalizer["type"] == "Prepend":
        return bool(normalizer["prepend"] == "▁")
    pattern = normalizer.get("pattern", {})
    return bool(normalizer["type"] == "Replace" and pattern.get("String") == " " and normalizer["content"] == "▁")


def _keeps_text(pre_tokenizer: dict[str, Any] | None) -> bool:
    """Whether all of a text comes out of it."""
    steps = _steps(pre_tokenizer, "pretokenizers")
    return all(step["type"] in _SPLITTERS and step.get("behavior") != "Removed" for step in steps)
