"""The serialised backend of a tokenizer, which is the text of a `tokenizer.json`: rewritten for engines, and compared.

Guarantees: what is rewritten encodes as before, but for what each function says.
Cost: vocabularies are tens of MB; they are parsed only where a change concerns them.
"""

import json
import re
from collections.abc import Callable
from typing import Any

from jllm.data.tokenizer import fast_json

_HEAD = re.compile(
    r'\s*\{\s*"version"\s*:\s*"1\.0"\s*,\s*"truncation"\s*:\s*null\s*,\s*"padding"\s*:\s*null\s*,\s*"added_tokens"\s*:\s*'
)


def rewritten(backend: str, *changes: Callable[[dict[str, Any]], dict[str, Any]]) -> str:
    """A serialised backend after these changes: `as_inert`, `for_fastokens`.

    Without a Metaspace pre-tokenizer they concern nothing but truncation, padding and the added tokens, which stand
    at the beginning: then the vocabulary behind them, some 10 MB, is not parsed.
    """
    head = _HEAD.match(backend)
    if head is None or '"Metaspace"' in backend:
        value = fast_json.loads(backend)
        for change in changes:
            value = change(value)
        return fast_json.dumps(value)
    tokens, end = json.JSONDecoder().raw_decode(backend, head.end())
    value = {"truncation": None, "padding": None, "added_tokens": tokens, "pre_tokenizer": None}
    for change in changes:
        value = change(value)
    return backend[: head.end()] + fast_json.dumps(value["added_tokens"]) + backend[end:]


_MERGES = re.compile(r'"merges":\s*(?=\[\s*\[)')


def with_short_merges(backend: str) -> str:
    """A serialised backend whose merges are written as "a b" where they were ["a", "b"], if no token has a blank:
    fastokens reads them so much faster that rewriting them is paid back several times."""
    found = _MERGES.match(backend, backend.rfind('"merges":'))
    if found is None:
        return backend
    start, end = found.end(), backend.rfind("]") + 1
    try:
        merges = fast_json.loads(backend[start:end])
        short = fast_json.dumps([" ".join(merge) for merge in merges if isinstance(merge, list)])
    except (ValueError, TypeError):  # something stands behind the merges, or in them: the engine will say what
        return backend
    return backend[:start] + short + backend[end:] if merges and short.count(" ") == len(merges) else backend


def for_fastokens(value: dict[str, Any]) -> dict[str, Any]:
    """A backend, changed into what fastokens reads: a Metaspace pre-tokenizer becomes the normalizer it amounts to.

    transformers 5 gives Llama-2-like tokenizers a Metaspace pre-tokenizer that does not split: every piece of text
    gets a "▁" in front unless it starts with one, after its spaces became "▁". Two Replace normalizers say the same.
    """
    value["truncation"] = value["padding"] = None
    pre = value["pre_tokenizer"]
    if pre and pre["type"] == "Metaspace":
        mark, scheme = pre["replacement"], pre["prepend_scheme"]
        if pre.get("split", True):
            raise ValueError("a Metaspace pre-tokenizer that splits")
        if scheme == "first" and any(not token["special"] for token in value["added_tokens"]):
            raise ValueError("a Metaspace pre-tokenizer that marks the first piece only")
        steps = [value["normalizer"]] if value["normalizer"] else []
        steps.append({"type": "Replace", "pattern": {"String": " "}, "content": mark})
        if scheme != "never":
            steps.append({"type": "Replace", "pattern": {"Regex": rf"\A(?!{mark})"}, "content": mark})
        value["normalizer"] = {"type": "Sequence", "normalizers": steps}
        value["pre_tokenizer"] = None
    return value


def marks_first_segment(pre_tokenizer: dict[str, Any] | None) -> bool:
    """Whether only the first segment of a text, of those between its control tokens, gets a "▁" in front."""
    return bool(pre_tokenizer and pre_tokenizer["type"] == "Metaspace" and pre_tokenizer["prepend_scheme"] == "first")


def as_inert(value: dict[str, Any]) -> dict[str, Any]:
    """A backend, changed: every added token is special, so that encoding special tokens as text covers all of them."""
    for token in value["added_tokens"]:
        token["special"] = True
    if marks_first_segment(value["pre_tokenizer"]):
        # The segments of a conversation are encoded apart; `Assembler.assemble` marks the first one.
        value["pre_tokenizer"]["prepend_scheme"] = "never"
    return value


def encoding_of(backend: str) -> Any:
    """What in a serialised backend decides which ids a text gets, written in one way for all versions of the
    format."""
    value = fast_json.loads(backend)
    for key in ("version", "truncation", "padding", "post_processor", "decoder"):
        value.pop(key, None)
    model = value["model"]
    for key in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"):
        model[key] = model.get(key) or None
    for key in ("fuse_unk", "byte_fallback", "ignore_merges"):
        model[key] = bool(model.get(key))
    if model.get("merges") and isinstance(model["merges"][0], str):
        model["merges"] = [merge.split(" ") for merge in model["merges"]]
    return _without_offsets(value)


def _without_offsets(value: Any) -> Any:
    """`value` without the settings that concern offsets only."""
    if isinstance(value, dict):
        return {
            key: item if key in ("vocab", "merges") else _without_offsets(item)
            for key, item in value.items()
            if key != "trim_offsets"
        }
    return [_without_offsets(item) for item in value] if isinstance(value, list) else value
