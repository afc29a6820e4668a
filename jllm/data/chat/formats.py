"""Chat records in the formats that people have, all to messages with roles, tools, and which answers count.

| format | a record |
| --- | --- |
| `roles` | `[{"system": ..}, {"user": ..}, {"assistant": ..}, ...]`, or that list under `conversation` |
| `messages` | `{"messages": [{"role", "content", "tool_calls"?, "train"?, "weight"?}], "tools"?}` (OpenAI) |
| `sharegpt` | `{"conversations": [{"from", "value"}], "system"?, "tools"?}` |
| `alpaca` | `{"instruction", "input"?, "output", "system"?, "history"?}` |
| `completion` | `{"prompt", "completion"}`: two texts, no template |
| `fields` | one question and one answer under names of their own (`--field_map user=question,assistant=answer`) |

Preference records (`chosen`, `rejected`) will be one more entry of `READERS`.

Guarantees: consecutive messages of one role are joined, answers before the first question are left out, and so is
whatever follows the last answer. A record that does not have its format is a `BadRecordError`, never a guess.
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jllm.errors import UserError

ROLES_OF_SHAREGPT = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
    "function_response": "tool",
}
_KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
_REASONING = ("reasoning_content", "reasoning", "thinking")


class BadRecordError(Exception):
    """A record that is not what its format says: the kind of mistake and the detail."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind
        self.detail = detail


@dataclasses.dataclass(kw_only=True)
class Conversation:
    """What a template renders.

    Attributes:
        messages: dicts with `role` and `content` (text), and `tool_calls`, `reasoning_content`, ... where given.
        trained: for each message, whether it is an answer to train on.
        tools: tool descriptions for the template, or None.
        completion: instead of messages: the prompt and its completion.
    """

    messages: list[dict[str, Any]]
    trained: list[bool]
    tools: list[Any] | None = None
    completion: tuple[str, str] | None = None


def _text(value: Any, where: str) -> str:
    """Content given as text, as a list of texts, or as null."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, list):
        parts = []
        for part in value:
            if isinstance(part, str):
                parts.append(part)
            elif isinstance(part, dict) and isinstance(part.get("text"), str):
                parts.append(part["text"])
            else:
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                raise BadRecordError("wrong type", f"{where} has a part that is no text ({kind})")
        return "".join(parts)
    raise BadRecordError("wrong type", f"{where} is {type(value).__name__}, not text")


def _list(record: Any, key: str) -> list[Any]:
    value = record.get(key) if isinstance(record, dict) else None
    if value is None:
        raise BadRecordError("missing field", f'no "{key}"')
    if not isinstance(value, list):
        raise BadRecordError("wrong type", f'"{key}" is {type(value).__name__}, not a list')
    return value


def _tools(value: Any) -> list[Any] | None:
    """Tools given as a list or as JSON text."""
    if isinstance(value, str):
        if not value.strip():
            return None
        try:
            value = json.loads(value)
        except ValueError:
            raise BadRecordError("wrong type", '"tools" is text and no JSON') from None
    if value is None or value == []:
        return None
    if not isinstance(value, list):
        raise BadRecordError("wrong type", f'"tools" is {type(value).__name__}, not a list')
    return [tool if not isinstance(tool, dict) or "function" in tool or "name" not in tool
            else {"type": "function", "function": tool} for tool in value]  # fmt: skip


def _of_roles(record: Any, fields: dict[str, str]) -> Conversation:
    turns = record if isinstance(record, list) else _list(record, "conversation")
    messages = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise BadRecordError("wrong type", f"turn {number} is {type(turn).__name__}, not an object")
        for role, content in turn.items():
            if role not in _KNOWN_ROLES:
                raise BadRecordError("wrong type", f'turn {number} has the role "{role}"')
            messages.append({"role": role, "content": _text(content, f"turn {number}")})
    tools = _tools(record.get("tools")) if isinstance(record, dict) else None
    return Conversation(
        messages=messages, trained=[message["role"] == "assistant" for message in messages], tools=tools
    )


def _of_messages(record: Any, fields: dict[str, str]) -> Conversation:
    messages, trained = [], []
    for number, given in enumerate(_list(record, "messages")):
        if (
            type(given) is dict
            and len(given) == 2
            and type(given.get("content")) is str
            and type(given.get("role")) is str
        ):
            messages.append(given)
            trained.append(given["role"] == "assistant")
            continue
        if not isinstance(given, dict) or not isinstance(given.get("role"), str):
            raise BadRecordError("wrong type", f"message {number} is no object with a role")
        message = {key: value for key, value in given.items() if key not in ("train", "weight") and value is not None}
        message["content"] = _text(given.get("content"), f"message {number}")
        if message.get("tool_calls"):
            message["tool_calls"] = [_tool_call(call, number) for call in _list(message, "tool_calls")]
        reasoning = next((message[key] for key in _REASONING if isinstance(message.get(key), str)), None)
        if reasoning is not None:
            message.update(dict.fromkeys(_REASONING, reasoning))
        messages.append(message)
        trained.append(message["role"] == "assistant" and _counts(given, number))
    return Conversation(messages=messages, trained=trained, tools=_tools(record.get("tools")))


def _counts(message: dict[str, Any], number: int) -> bool:
    """The flags `train` (true or false) and `weight` (0 or 1) of a message."""
    for key in ("train", "weight"):
        value = message.get(key)
        if value is not None and value not in (0, 1):
            raise BadRecordError("wrong type", f'message {number} has "{key}" {value!r}; it must be 0 or 1')
        if value is not None and not value:
            return False
    return True


def _tool_call(call: Any, number: int) -> dict[str, Any]:
    """A tool call whose arguments are an object: templates write them as JSON themselves."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRecordError("wrong type", f"message {number} has a tool call without a name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            raise BadRecordError("wrong type", f"message {number} has tool arguments that are no JSON") from None
    assert isinstance(call, dict)
    return {**call, "type": "function", "function": {**function, "arguments": arguments}}


def _of_sharegpt(record: Any, fields: dict[str, str]) -> Conversation:
    messages: list[dict[str, Any]] = []
    if isinstance(record, dict) and record.get("system"):
        messages.append({"role": "system", "content": _text(record["system"], '"system"')})
    for number, turn in enumerate(_list(record, "conversations")):
        origin = turn.get("from") if isinstance(turn, dict) else None
        if origin not in ROLES_OF_SHAREGPT:
            raise BadRecordError("wrong type", f"turn {number} is from {origin!r}")
        content = _text(turn.get("value"), f"turn {number}")
        message: dict[str, Any] = {"role": ROLES_OF_SHAREGPT[origin], "content": content}
        if origin == "function_call":
            try:
                calls = json.loads(content)
            except ValueError:
                raise BadRecordError("wrong type", f"turn {number} is a function call that is no JSON") from None
            calls = calls if isinstance(calls, list) else [calls]
            message = {"role": "assistant", "content": "", "tool_calls": [_tool_call(call, number) for call in calls]}
        messages.append(message)
    trained = [message["role"] == "assistant" for message in messages]
    return Conversation(messages=messages, trained=trained, tools=_tools(record.get("tools")))


def _of_alpaca(record: Any, fields: dict[str, str]) -> Conversation:
    if not isinstance(record, dict) or record.get("instruction") is None or record.get("output") is None:
        raise BadRecordError("missing field", 'no "instruction" or no "output"')
    turns: list[tuple[str, Any]] = []
    if record.get("system"):
        turns.append(("system", record["system"]))
    for pair in record.get("history") or ():
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRecordError("wrong type", '"history" is no list of pairs')
        turns += [("user", pair[0]), ("assistant", pair[1])]
    instruction, extra = _text(record["instruction"], '"instruction"'), _text(record.get("input"), '"input"')
    turns += [("user", f"{instruction}\n{extra}" if extra else instruction), ("assistant", record["output"])]
    return _of_turns(turns)


def _of_turns(turns: Sequence[tuple[str, Any]]) -> Conversation:
    messages = [{"role": role, "content": _text(content, f'"{role}"')} for role, content in turns]
    return Conversation(messages=messages, trained=[role == "assistant" for role, _ in turns])


def _of_completion(record: Any, fields: dict[str, str]) -> Conversation:
    if not isinstance(record, dict) or record.get("prompt") is None or record.get("completion") is None:
        raise BadRecordError("missing field", 'no "prompt" or no "completion"')
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        asked = _of_messages({"messages": prompt}, fields)
        answered = _of_messages({"messages": completion, "tools": record.get("tools")}, fields)
        return Conversation(
            messages=asked.messages + answered.messages,
            trained=[False] * len(asked.messages) + answered.trained,
            tools=answered.tools,
        )
    pair = (_text(prompt, '"prompt"'), _text(completion, '"completion"'))
    if not pair[1]:
        raise BadRecordError("empty document", '"completion" has no text')
    return Conversation(messages=[], trained=[], completion=pair)


def _of_fields(record: Any, fields: dict[str, str]) -> Conversation:
    turns = []
    for role, field in fields.items():
        value = record.get(field) if isinstance(record, dict) else None
        if value is None and role in ("user", "assistant"):
            raise BadRecordError("missing field", f'no "{field}"')
        if value:
            turns.append((role, value))
    return _of_turns(turns)


READERS: dict[str, Callable[[Any, dict[str, str]], Conversation]] = {
    "roles": _of_roles,
    "messages": _of_messages,
    "sharegpt": _of_sharegpt,
    "alpaca": _of_alpaca,
    "completion": _of_completion,
    "fields": _of_fields,
}
SAMPLE = 100
"""So many records are looked at to find out their format."""
QUESTION_ANSWER = {"system": "system", "user": "question", "assistant": "answer"}


def format_of(record: Any) -> str | None:
    """The format that a record looks like; None where it looks like none."""
    if isinstance(record, list):
        return "roles" if record and isinstance(record[0], dict) else None
    if not isinstance(record, dict):
        return None
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
    found = [name for name in map(format_of, itertools.islice(records, SAMPLE)) if name]
    if not found:
        raise UserError(
            f"{where}: its first records look like no known chat format ({', '.join(READERS)}); name one with --format,"
            " or fields with --field_map user=..,assistant=..; for documents use -t pretrain"
        )
    return max(found, key=found.count)


def read_conversation(record: Any, format_name: str, fields: dict[str, str]) -> Conversation:
    """A record as a conversation that ends with an answer.

    Args:
        format_name: out of `READERS`.
        fields: role → field, for the format `fields`.

    Raises:
        BadRecordError: it does not have the format, or no answer.
    """
    conversation = READERS[format_name](record, fields)
    return conversation if conversation.completion else _tidy(conversation)


def _tidy(given: Conversation) -> Conversation:
    """Join messages of one role, leave out answers before the first question and what follows the last answer."""
    messages: list[dict[str, Any]] = []
    trained: list[bool] = []
    asked = False
    for message, counts in zip(given.messages, given.trained, strict=True):
        role = message["role"]
        if role == "assistant" and not asked:
            continue
        asked = asked or role in ("user", "tool")
        if messages and role == messages[-1]["role"] and role in ("system", "user", "assistant"):
            previous = messages[-1]
            if len(previous) == len(message) == 2 and counts == trained[-1]:
                messages[-1] = {"role": role, "content": previous["content"] + message["content"]}
                continue
        messages.append(message)
        trained.append(counts)
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
        trained.pop()
    if not messages:
        raise BadRecordError("no answer", "no assistant message after a question")
    if not any(trained):
        raise BadRecordError("no answer", "no assistant message that is trained on")
    return Conversation(messages=messages, trained=trained, tools=given.tools)
