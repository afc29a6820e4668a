"""The text of a message: text, parts, or null.

Guarantees: a part that is no text is refused by the name of its type; nothing is glued together that its format does
not join.
"""

from typing import Any, NamedTuple

from jllm.data.chat.records.conversation import BadRecordError, shown
from jllm.data.sources.records import json_type

_TEXT_PARTS = (None, "text", "input_text", "output_text")
_REASONING_PARTS = ("thinking", "reasoning")
_HARMLESS = ("type", "cache_control", "annotations", "citations", "index", "id", "logprobs", "signature")


class Content(NamedTuple):
    """What a message says: its text, and reasoning where a part holds some."""

    text: str
    reasoning: str = ""


def content_of(value: Any, where: str) -> Content:
    """The content of a message, `where` being what a mistake is said of.

    Raises:
        BadRecordError: it is neither text nor a list of parts that are text.
    """
    if isinstance(value, str):
        return Content(value)
    if value is None:
        return Content("")
    if not isinstance(value, list):
        raise BadRecordError("wrong type", f"{where} is {json_type(value)}, not text")
    texts, reasoning = [], []
    for part in value:
        if isinstance(part, str):
            raise BadRecordError("wrong type", f"{where} is a list of texts, and nothing says how they belong together")
        if not isinstance(part, dict):
            raise BadRecordError("wrong type", f"{where} has a part that is {json_type(part)}, not an object")
        kind = part.get("type")
        if kind in _TEXT_PARTS:
            texts.append(_only_text(part, "text", where))
        elif kind == "refusal":
            texts.append(_only_text(part, "refusal", where))
        elif kind in _REASONING_PARTS:
            reasoning.append(_only_text(part, "text" if part.get(kind) is None else kind, where))
        else:
            raise BadRecordError("unknown part", f"{where} has a part of the type {shown(kind)}; known is text")
    return Content("".join(texts), "".join(reasoning))


def _only_text(part: dict[str, Any], field: str, where: str) -> str:
    """The text of a part that holds nothing else."""
    text = part.get(field)
    if not isinstance(text, str):
        raise BadRecordError("wrong type", f"{where} has a part whose {shown(field)} is {json_type(text)}, not text")
    for name, value in part.items():
        if name != field and name not in _HARMLESS and value not in (None, "", [], {}):
            raise BadRecordError("unknown part", f"{where} has a part of text that also holds {shown(name)}")
    return text


def text_of(value: Any, where: str) -> str:
    """Text, parts of text, or null as text.

    Raises:
        BadRecordError: it is something else.
    """
    found = content_of(value, where)
    if found.reasoning:
        raise BadRecordError("unknown part", f"{where} has a part of reasoning, which only a message may have")
    return found.text
