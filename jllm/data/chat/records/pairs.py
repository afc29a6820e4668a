"""Preference pairs: one prompt with a chosen and a rejected answer, to two conversations.

| a record | |
| --- | --- |
| `{"prompt", "chosen", "rejected"}` | texts, or lists of messages; the answers without the prompt (explicit) |
| `{"chosen", "rejected"}` | lists of messages that each begin with the prompt (implicit; UltraFeedback) |
| the same, as texts | `\\n\\nHuman: ..\\n\\nAssistant: ..` (HH-RLHF) |
| `{"conversations", "chosen", "rejected"}` | ShareGPT; the answers are messages (LLaMA-Factory) |

With a field map (`prompt=..,chosen=..,rejected=..,system=..,tools=..`) the same under other names; dots lead into
objects and lists (`answers.0.text`).

Guarantees: both conversations have the same prompt, of which nothing is trained on; what a record says comes out, is
counted by name, or makes it a `BadRecordError`. Pairs of one answer, and answers that say nothing, are bad.
"""

import itertools
import re
from collections.abc import Mapping
from typing import Any

from jllm.data.chat.records.beside import with_fields, without_ignored_tools
from jllm.data.chat.records.content import text_of
from jllm.data.chat.records.conversation import BadRecordError, Conversation, ReadingStyle
from jllm.data.chat.records.messages import ROLES, read_messages
from jllm.data.chat.records.tidying import tidy
from jllm.data.sources.records import field_of, json_type, path_of

CHOSEN, REJECTED = "chosen", "rejected"
PAIR_FIELDS = ("prompt", CHOSEN, REJECTED, "system", "tools")
"""What a field map may name."""
PROMPTS = ("prompt", "conversations", "messages", "conversation", "question", "instruction")
"""Fields that hold the prompt, where the answers do not: the first that is there."""
_HUMAN = re.compile(r"(?:^|\n\n)(Human|Assistant):(?: |(?=\n|$))")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def is_unpaired(record: Any) -> bool:
    """Whether a record is one judged answer (`{prompt, completion, label}`, as KTO has them)."""
    return isinstance(record, dict) and "completion" in record and isinstance(record.get("label"), bool)


def read_pair(record: Any, fields: Mapping[str, str], style: ReadingStyle) -> tuple[Conversation, Conversation]:
    """A record as its chosen and its rejected conversation.

    Args:
        fields: what `PAIR_FIELDS` are called in the record; empty where they have their own names.
        style: what depends on the template and the options.

    Raises:
        BadRecordError: it is no pair, or not one of two different answers to one prompt.
    """
    if not isinstance(record, dict):
        raise BadRecordError("wrong type", f"the record is {json_type(record)}, not an object")
    if is_unpaired(record) and not fields:
        raise BadRecordError(
            "unpaired answer", "it is one judged answer (prompt, completion, label), not a chosen and a rejected one"
        )
    given, used = _mapped(record, fields) if fields else (record, [])
    for side in (CHOSEN, REJECTED):
        if given.get(side) is None:
            name = fields.get(side, side)
            raise BadRecordError("missing field", f'"{name}" is null' if name in record else f'no "{name}"')
    prompt, names = _prompt(given, style)
    chosen, rejected = (_side(given, side, prompt, style) for side in (CHOSEN, REJECTED))
    if chosen.messages == rejected.messages:
        raise BadRecordError("identical pair", "the chosen and the rejected answer are the same")
    _only_answers_count(chosen, rejected, asked=len(prompt.messages) if prompt is not None else 0)
    rest = {name: value for name, value in record.items() if name not in used} if fields else dict(record)
    if fields:
        rest |= {name: given[name] for name in ("system", "tools") if given.get(name) is not None}
    elif prompt is None:
        names = (*names, *_said_again(record, chosen))
    drop = () if fields else (*names, CHOSEN, REJECTED)
    found = [with_fields(rest, drop, each) for each in (chosen, rejected)]
    found[1].notes = {name: count for name, count in found[1].notes.items() if name not in found[0].notes}
    tidied = [without_ignored_tools(tidy(each, style), style) for each in found]
    return tidied[0], tidied[1]


def _mapped(record: dict[str, Any], fields: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """What a field map finds in a record, under the names of `PAIR_FIELDS`; the fields of the record it was found
    in."""
    found, tops = {}, []
    for name, field in fields.items():
        path = path_of(field)
        found[name] = field_of(record, path)
        tops.append(field if field in record else path[0])
        if found[name] is None and name == "prompt":
            raise BadRecordError("missing field", f'no "{field}" (there is: {", ".join(map(str, record))[:80]})')
    return found, tops


def _prompt(given: dict[str, Any], style: ReadingStyle) -> tuple[Conversation | None, tuple[str, ...]]:
    """The prompt that stands in a field of its own, and the fields that it was made of; None where the answers hold
    it."""
    if _holds_whole(given[CHOSEN]) and _holds_whole(given[REJECTED]):
        return None, ()
    name = next((name for name in PROMPTS if given.get(name) not in (None, "", [])), None)
    if name is None:
        return None, ()
    value = given[name]
    names: tuple[str, ...] = (name,)
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list) and all(isinstance(item, dict) and item.get("type") != "text" for item in value):
        return _untrained(read_messages(value, style)), names
    text = text_of(value, f'"{name}"')
    turns = _turns(text)
    if turns is not None:
        if turns and turns[-1] == ("assistant", ""):
            turns = turns[:-1]
        return _untrained(_of_turns(turns, style)), names
    if name == "instruction":
        more = text_of(given.get("input"), '"input"')
        text, names = "\n".join(part for part in (text, more) if part), (name, "input")
    return _untrained(_of_turns([("user", text)], style)), names


def _holds_whole(value: Any) -> bool:
    """Whether an answer begins with its prompt."""
    if isinstance(value, str):
        turns = _turns(value)
        return turns is not None and any(role == "user" for role, _ in turns)
    return isinstance(value, list) and any(isinstance(item, dict) and _asks(item) for item in value)


def _asks(message: dict[str, Any]) -> bool:
    return "user" in message or ROLES.get(str(message.get("role", message.get("from")))) == "user"


def _side(given: dict[str, Any], side: str, prompt: Conversation | None, style: ReadingStyle) -> Conversation:
    value = given[side]
    if isinstance(value, str):
        turns = _turns(value) if prompt is None else None
        if prompt is None and turns is None:
            raise BadRecordError("missing field", f'no prompt: neither beside "{side}", nor in it')
        answer = _of_turns(turns if turns is not None else [("assistant", value)], style)
    else:
        messages = [value] if isinstance(value, dict) else value
        if not isinstance(messages, list):
            raise BadRecordError("wrong type", f'"{side}" is {json_type(value)}, neither text nor messages')
        if not messages:
            raise BadRecordError("empty answer", f'"{side}" has no message')
        answer = read_messages(messages, style)
    if not answer.messages or answer.messages[-1]["role"] != "assistant":
        raise BadRecordError("no answer", f'"{side}" does not end with an answer')
    if prompt is None:
        return Conversation(
            messages=list(answer.messages),
            trained=list(answer.trained),
            refused=list(answer.refused),
            tools=answer.tools,
            notes=answer.notes,
        )
    return Conversation(
        messages=[*prompt.messages, *answer.messages],
        trained=[*prompt.trained, *answer.trained],
        refused=[*prompt.refused, *answer.refused],
        tools=answer.tools or prompt.tools,
        notes={**prompt.notes, **answer.notes},
    )


def _only_answers_count(chosen: Conversation, rejected: Conversation, *, asked: int) -> None:
    """Train on nothing of what both have in common, the prompt.

    Raises:
        BadRecordError: what differs first is not an answer, so that there is no prompt that both answer.
    """
    pairs = zip(chosen.messages, rejected.messages, strict=False)
    common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    common = max(common, asked)
    for each in (chosen, rejected):
        if common < len(each.messages) and each.messages[common]["role"] != "assistant":
            raise BadRecordError("prompts differ", f"message {common} is a question, and not the same in both")
        if common >= len(each.messages):
            raise BadRecordError("prompts differ", "one conversation is the begin of the other")
        each.trained = [counts and number >= common for number, counts in enumerate(each.trained)]


def _said_again(record: dict[str, Any], chosen: Conversation) -> list[str]:
    """The fields beside a pair that say what its chosen conversation says: its question, or all of it."""
    texts = {message["content"].strip() for message in chosen.messages}
    names = []
    for name in PROMPTS:
        value = record.get(name)
        if (isinstance(value, str) and value.strip() in texts) or (
            isinstance(value, list)
            and value
            and all(
                isinstance(item, dict) and str(item.get("content", item.get("value", ""))).strip() in texts
                for item in value
            )
        ):
            names.append(name)
    return names


def _untrained(given: Conversation) -> Conversation:
    if not given.messages:
        raise BadRecordError("missing field", "the prompt is empty")
    if given.messages[-1]["role"] == "assistant":
        raise BadRecordError("wrong type", "the prompt ends with an answer")
    return Conversation(
        messages=list(given.messages),
        trained=[False] * len(given.messages),
        refused=list(given.refused),
        tools=given.tools,
        notes=given.notes,
    )


def _of_turns(turns: list[tuple[str, str]], style: ReadingStyle) -> Conversation:
    return read_messages([{"role": role, "content": text} for role, text in turns], style)


def _turns(text: str) -> list[tuple[str, str]] | None:
    """The turns of a dialogue in HH-RLHF's form; None where a text has none of its marks at its begin."""
    marks = list(_HUMAN.finditer(text))
    if not marks or text[: marks[0].start()].strip():
        return None
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    return [(_ROLES[mark.group(1)], text[mark.end() : end].strip()) for mark, end in zip(marks, ends, strict=True)]
