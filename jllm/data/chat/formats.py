"""Chat records in the formats that people have, all to messages with roles, tools, and which answers count.

| format | a record |
| --- | --- |
| `roles` | `[{"system": ..}, {"user": ..}, {"assistant": ..}, ...]`, or that list under `conversation` |
| `messages` | `{"messages": [{"role", "content", "tool_calls"?, "train"?, "weight"?}], "tools"?}` (OpenAI) |
| `sharegpt` | `{"conversations": [{"from", "value"}], "system"?, "tools"?}` |
| `alpaca` | `{"instruction", "input"?, "output", "system"?, "history"?}` |
| `completion` | `{"prompt", "completion"}`: two texts, no template |
| `fields` | texts or lists of messages in fields of their own (`--field_map user=question,assistant=answer`) |

Preference pairs (`chosen`, `rejected`) are recognised, and none of these; `records/pairs.py` reads them.

Guarantees: what a record says comes out, is counted by name, or the record is a `BadRecordError`, never a guess. What
its messages say is read in one place for all formats (`records/messages.py`), and so is what stands beside them
(`records/beside.py`), what is joined and what is left out (`records/tidying.py`).
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jllm.data.chat.records.beside import with_fields, without_ignored_tools
from jllm.data.chat.records.content import text_of
from jllm.data.chat.records.conversation import BadRecordError, Conversation, ReadingStyle
from jllm.data.chat.records.messages import ROLES, read_messages
from jllm.data.chat.records.tidying import tidy
from jllm.data.sources.records import field_of, json_type, path_of
from jllm.errors import UserError

Fields = dict[str, str]
"""Role → field, for the format `fields`."""


def _field(record: Any, key: str) -> Any:
    """What a record must have in a field."""
    if not isinstance(record, dict):
        raise BadRecordError("wrong type", f"the record is {json_type(record)}, not an object")
    value = record.get(key)
    if value is None:
        raise BadRecordError("missing field", f'"{key}" is null' if key in record else f'no "{key}"')
    return value


def _list(record: Any, key: str) -> list[Any]:
    value = _field(record, key)
    if not isinstance(value, list):
        raise BadRecordError("wrong type", f'"{key}" is {json_type(value)}, not a list')
    return value


def _of_list(key: str) -> Callable[[Any, Fields, ReadingStyle], Conversation]:
    """The reader of records with a list of messages in this field."""

    def read(record: Any, fields: Fields, style: ReadingStyle) -> Conversation:
        found = read_messages(_list(record, key), style)
        return found if len(record) == 1 else with_fields(record, (key,), found)

    return read


def _of_roles(record: Any, fields: Fields, style: ReadingStyle) -> Conversation:
    return read_messages(record, style) if isinstance(record, list) else _of_conversation(record, fields, style)


def _of_alpaca(record: Any, fields: Fields, style: ReadingStyle) -> Conversation:
    instruction, extra = (text_of(value, f'"{key}"') for key, value in (
        ("instruction", _field(record, "instruction")), ("input", record.get("input"))
    ))  # fmt: skip
    turns: list[tuple[str, Any]] = []
    history = record.get("history") or []
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRecordError("wrong type", '"history" is no list of pairs')
        turns += [
            (role, text_of(text, 'a text of "history"')) for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
    question = "\n".join(text for text in (instruction, extra) if text)
    turns += [("user", question), ("assistant", text_of(_field(record, "output"), '"output"'))]
    return with_fields(record, ("instruction", "input", "output", "history"), _of_turns(turns, style))


def _of_turns(turns: Sequence[tuple[str, Any]], style: ReadingStyle) -> Conversation:
    return read_messages([{"role": role, "content": content} for role, content in turns], style)


def _of_completion(record: Any, fields: Fields, style: ReadingStyle) -> Conversation:
    prompt, completion = _field(record, "prompt"), _field(record, "completion")
    if _holds_messages(prompt) and _holds_messages(completion):
        asked = read_messages(prompt, style)
        found = _and_then(asked, read_messages(completion, style), trained=False)
    else:
        pair = (text_of(prompt, '"prompt"'), text_of(completion, '"completion"'))
        if not pair[1].strip():
            raise BadRecordError("empty document", '"completion" has no text')
        found = Conversation(messages=[], trained=[], refused=[], completion=pair)
    return with_fields(record, ("prompt", "completion"), found)


def _holds_messages(value: Any) -> bool:
    """Whether this is a list of messages, and not one of parts of a text."""
    return isinstance(value, list) and all(
        isinstance(item, dict) and ("role" in item or "from" in item or "type" not in item) for item in value
    )


def _and_then(first: Conversation, second: Conversation, *, trained: bool) -> Conversation:
    """One conversation of two; `trained` says whether answers of the first count."""
    found = Conversation(
        messages=first.messages + second.messages,
        trained=[counts and trained for counts in first.trained] + second.trained,
        refused=first.refused + second.refused,
        tools=second.tools or first.tools,
        notes=first.notes,
    )
    for name, times in second.notes.items():
        found.note(name, times)
    return found


def _of_fields(record: Any, fields: Fields, style: ReadingStyle) -> Conversation:
    found = Conversation(messages=[], trained=[], refused=[])
    tops: list[str] = []
    beside: dict[str, Any] = {}
    for role, field in fields.items():
        path = path_of(field)
        value = field_of(record, path)
        tops.append(field if isinstance(record, dict) and field in record else path[0])
        if value is None and role != "system" and role != "tools":
            keys = ", ".join(map(str, record)) if isinstance(record, dict) else json_type(record)
            raise BadRecordError("missing field", f'no "{field}" (there is: {keys[:80]})')
        if role == "tools":
            beside["tools"] = value
        elif isinstance(value, dict) and ("role" in value or "from" in value):
            found = _and_then(found, read_messages([value], style), trained=True)
        elif isinstance(value, list) and value and _holds_messages(value):
            found = _and_then(found, read_messages(value, style), trained=True)
        elif role == "messages":
            raise BadRecordError("wrong type", f'"{field}" is {json_type(value)}, not a list of messages')
        elif value is not None and (value != "" or role != "system"):
            found = _and_then(found, _of_turns([(role, text_of(value, f'"{field}"'))], style), trained=True)
    rest = {name: value for name, value in record.items() if name not in tops} if isinstance(record, dict) else {}
    return with_fields({**rest, **beside}, (), found)


_of_conversation = _of_list("conversation")
READERS: dict[str, Callable[[Any, Fields, ReadingStyle], Conversation]] = {
    "roles": _of_roles,
    "messages": _of_list("messages"),
    "sharegpt": _of_list("conversations"),
    "alpaca": _of_alpaca,
    "completion": _of_completion,
    "fields": _of_fields,
}
_QUESTIONS = ("conversations", "messages", "conversation", "prompt", "question", "instruction", "input")
SAMPLE = 100
"""So many records are looked at to find out their format."""
QUESTION_ANSWER = {"system": "system", "user": "question", "assistant": "answer"}
PAIRS = "preference pairs"
"""What records with a chosen and a rejected answer look like; no format of `READERS`: `read_pair` reads them."""


def format_of(record: Any) -> str | None:
    """The format that a record looks like, or `PAIRS`; None where it looks like none."""
    if isinstance(record, list):
        return "roles" if record and isinstance(record[0], dict) else None
    if not isinstance(record, dict):
        return None
    if is_pair(record) and not _is_answered(record):
        return PAIRS
    if "messages" in record:
        return "messages"
    if "conversations" in record:
        return "sharegpt"
    if "conversation" in record:
        return "roles"
    if "instruction" in record and "output" in record:
        return "alpaca"
    if "prompt" in record and "completion" in record:
        return "completion"
    return "fields" if "question" in record and "answer" in record else None


def commonest_format(records: Iterable[Any], where: str) -> str:
    """The format that most of the first `SAMPLE` records look like; of several the one that comes first.

    Args:
        where: what a mistake is said of.

    Raises:
        UserError: they look like no known format.
    """
    looked_at = list(itertools.islice(records, SAMPLE))
    found = [name for name in map(format_of, looked_at) if name]
    if not found:
        raise UserError(
            f"{where}: its first records{_what(looked_at)} look like no known chat format ({', '.join(READERS)}); name"
            " one with --format, or fields with --field_map user=..,assistant=..; for documents use -t pretrain"
        )
    commonest = max(found, key=found.count)
    if commonest == PAIRS:
        pair = next(record for record in looked_at if format_of(record) == PAIRS)
        raise UserError(
            f"{where}: its records are preference pairs (chosen, rejected), not conversations; give -t preference to"
            f" train on both answers; {_way(pair)}"
        )
    return commonest


def _what(records: list[Any]) -> str:
    """What the first record is, for a message."""
    if not records or isinstance(records[0], list):
        return ""
    has = f"has: {', '.join(map(str, records[0]))}" if isinstance(records[0], dict) else f"is {json_type(records[0])}"
    return f" (the first {has[:80]})"


def is_pair(record: Any) -> bool:
    """Whether a record holds a chosen and a rejected answer."""
    return isinstance(record, dict) and all(record.get(key) is not None for key in ("chosen", "rejected"))


def _way(record: dict[str, Any]) -> str:
    """How to train on the chosen answers of records like this pair."""
    chosen = record["chosen"]
    asks = isinstance(chosen, list) and any(
        isinstance(item, dict) and ROLES.get(str(item.get("role", item.get("from")))) == "user" for item in chosen
    )
    fields = [] if asks else [name for name in _QUESTIONS if record.get(name) is not None][:1]
    parts = [f"{'messages' if isinstance(record[name], list) else 'user'}={name}" for name in fields]
    parts.append("messages=chosen" if asks else "assistant=chosen")
    return f"--field_map {','.join(parts)} trains on the chosen answers"


def _is_answered(record: dict[str, Any]) -> bool:
    """Whether a record of a pair is a conversation with an answer all the same."""
    if any(record.get(key) is not None for key in ("output", "completion", "answer")):
        return True
    for key in ("messages", "conversations", "conversation"):
        messages = record.get(key)
        last = messages[-1] if isinstance(messages, list) and messages else None
        if isinstance(last, dict) and ROLES.get(str(last.get("role", last.get("from")))) == "assistant":
            return True
    return False


_DEFAULT_STYLE = ReadingStyle()


def read_conversation(
    record: Any, format_name: str, fields: Fields, style: ReadingStyle = _DEFAULT_STYLE
) -> Conversation:
    """A record as a conversation that ends with an answer.

    Args:
        format_name: out of `READERS`.
        fields: role → field, for the format `fields`.
        style: what depends on the template and the options.

    Raises:
        BadRecordError: it does not have the format, or no answer.
    """
    if format_name != "fields" and is_pair(record) and not _is_answered(record):
        raise BadRecordError("preference pair", f"it has a chosen and a rejected answer; {_way(record)}")
    found = READERS[format_name](record, fields, style)
    return found if found.completion is not None else without_ignored_tools(tidy(found, style), style)
