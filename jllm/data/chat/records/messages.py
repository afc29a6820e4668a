"""Messages in the forms that people write, to a role, a text, calls and reasoning.

A message names its role (`role` or `from`, with `content`, `value` or `text`), or its role is the key of its text.

Guarantees: what a message holds comes out, is counted as left out, or is refused by name; a flag counts whatever the
form of its message.
"""

from typing import Any

from jllm.data.chat.records.calls import calls_of, tools_of
from jllm.data.chat.records.content import content_of
from jllm.data.chat.records.conversation import (
    LEFT_OUT,
    BadRecordError,
    Conversation,
    ReadingStyle,
    shown,
    unused,
)
from jllm.data.chat.records.flags import asks_for_training, flag_of, is_flag
from jllm.data.sources.records import json_type

CALLER = "function_call"
"""A role that is an assistant's call of a function, its content."""
ROLES = {
    **dict.fromkeys(("system", "system_prompt"), "system"),
    "developer": "developer",
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "chatgpt", "model", "ai"), "assistant"),
    **dict.fromkeys(
        ("tool", "observation", "function_response", "function", "ipython", "tool_response", "tool_result"), "tool"
    ),
    **dict.fromkeys(("function_call", "tool_call"), CALLER),
}
"""Roles under the names that people have for them."""
_KEYS = frozenset(
    ("system", "developer", "user", "human", "assistant", "gpt", "tool", "observation", "function", "ipython", CALLER)
)
"""Roles that may be the key of their text; other names are those of fields too."""
PLAIN_ROLES = frozenset(("system", "user", "assistant", "tool"))
_PLAIN_NAMES = {name: role for name, role in ROLES.items() if role in PLAIN_ROLES}
_PLAIN_KEYS = {name: role for name, role in _PLAIN_NAMES.items() if name in _KEYS}
REASONING = ("reasoning_content", "reasoning", "thinking")
METADATA = frozenset(
    [
        "id",
        "uid",
        "uuid",
        "idx",
        "index",
        "key",
        "message_id",
        "parent_id",
        "timestamp",
        "time",
        "date",
        "created",
        "created_at",
        "updated_at",
        "tool_call_id",
        "model",
        "lang",
        "language",
        "source",
        "url",
        "license",
        "dataset",
    ]
)
"""Fields that say nothing which could be trained on."""
_READ = frozenset(
    ("role", "from", "content", "value", "tool_calls", "function_call", "refusal", "tools", "functions", *REASONING)
)
_KEPT = frozenset(("name", "tool_call_id", "tool_name"))


def read_messages(given: list[Any], style: ReadingStyle) -> Conversation:
    """A list of messages in any of their forms.

    Raises:
        BadRecordError: a message has none of them.
    """
    if plain := _plain(given):
        return plain
    found = Conversation(messages=[], trained=[], refused=[])
    for number, item in enumerate(given):
        if not isinstance(item, dict):
            raise BadRecordError("wrong type", f"message {number} is {json_type(item)}, not an object")
        _read(item, number, style, found)
    return found


def _plain(given: list[Any]) -> Conversation | None:
    """Messages that are nothing but a role and a text that says something, whatever names these have; None where one is
    not. Most are, and looking is faster than reading."""
    messages, roles = [], []
    for item in given:
        if type(item) is not dict:
            return None
        if len(item) == 1:
            ((name, content),) = item.items()
            role = _PLAIN_KEYS.get(name)
        elif len(item) == 2:
            name = item.get("role")
            content = item.get("content")
            if type(name) is str and name in PLAIN_ROLES and type(content) is str:
                role = name
            else:
                name = item.get("from") if name is None else name
                content = item.get("value") if content is None else content
                role = _PLAIN_NAMES.get(name) if type(name) is str else None
        else:
            return None
        if role is None or type(content) is not str or not content or content.isspace():
            return None
        messages.append({"role": role, "content": content})
        roles.append(role)
    trained = [role == "assistant" for role in roles]
    return Conversation(messages=messages, trained=trained, refused=[False] * len(roles), roles=tuple(roles))


def _read(item: dict[str, Any], number: int, style: ReadingStyle, found: Conversation) -> None:
    key = next((key for key in ("role", "from") if item.get(key) is not None), None)
    if key is None:
        return _read_keyed(item, number, style, found)
    role = item[key]
    if not isinstance(role, str):
        raise BadRecordError("wrong type", f"message {number} has the role {shown(role)}, not text")
    given: list[str] = [field for field in ("content", "value") if field in item]
    if not given and isinstance(item.get("text"), str):
        given = ["text"]
    if len(given) == 2 and item["content"] is None:
        given = ["value"]
    elif len(given) == 2 and item["value"] not in (None, "", item["content"]):
        raise BadRecordError("wrong type", f'message {number} has both "content" and "value"')
    rest = {name: value for name, value in item.items() if name not in (key, "content", "value", *given)}
    return _add(role, item[given[0]] if given else None, rest, number, style, found)


def _read_keyed(item: dict[str, Any], number: int, style: ReadingStyle, found: Conversation) -> None:
    """`{"user": text, "assistant": text}`: the last of them has what else there is. A flag that says no is for all of
    them, one that says yes for the answer."""
    # A call is a field of an answer where an answer is there, else a turn of its own.
    keys = [name for name in item if name.lower() in _KEYS]
    answers = any(ROLES[name.lower()] == "assistant" for name in keys)
    roles = [name for name in keys if not (name == CALLER and answers)]
    if not roles:
        has = ", ".join(map(shown, item)) or "nothing"
        raise BadRecordError("unknown role", f"message {number} has no role; it has {has}"[:160])
    rest = {name: value for name, value in item.items() if name not in roles}
    for name, value in rest.items():
        if name not in _READ and name not in _KEPT and name not in METADATA and not is_flag(name) and value is not None:
            raise BadRecordError("unknown role", f"message {number} has the role {shown(name)}; {_known()}")
    flags = {name: value for name, value in rest.items() if is_flag(name)}
    if answers and flag_of(flags, f"message {number}"):
        flags = {}  # a yes for both is one for the answer
    carrier = next((name for name in roles if ROLES[name.lower()] == "assistant"), roles[-1])
    for name in roles:
        _add(name, item[name], rest if name == carrier else flags, number, style, found)


def _add(role: str, content: Any, rest: dict[str, Any], number: int, style: ReadingStyle, found: Conversation) -> None:
    """One message; `rest` is what it has beside its role and its content."""
    where = f"message {number}"
    known = ROLES.get(role.strip().lower(), role)
    if known == role and role not in ROLES.values() and role not in style.names:
        raise BadRecordError("unknown role", f"{where} has the role {shown(role)}; {_known()}")
    if known == "developer" and style.developer_as_system:
        known = "system"
    message: dict[str, Any] = {"role": known, "content": ""}
    if known == CALLER:
        message = {"role": "assistant", "content": "", "tool_calls": calls_of(content, where)}
        known, content = "assistant", None
    text, reasoning = content_of(content, where)
    if known == "user" and not text:
        raise BadRecordError("empty question", f"{where} is a question {_without(content)}")
    message["content"] = text
    if known == "assistant":
        _add_answer(message, rest, reasoning, where, style)
    elif reasoning:
        raise BadRecordError("unknown part", f"{where} has a part of reasoning, and is no answer")
    _add_rest(message, rest, where, style, found)
    said = flag_of(rest, where)
    found.messages.append(message)
    asked = known == "assistant" or (said is True and asks_for_training(rest))
    if said and not asked:
        found.note(f"{LEFT_OUT}weights of what is no answer")
    found.trained.append(asked and said is not False)
    found.refused.append(said is False)


def _add_answer(message: dict[str, Any], rest: dict[str, Any], reasoning: str, where: str, style: ReadingStyle) -> None:
    """What only an answer has: calls, reasoning, a refusal."""
    for name in ("tool_calls", "function_call"):
        if rest.get(name) not in (None, "", [], {}):
            if "tool_calls" in message:
                raise BadRecordError("wrong type", f'{where} has both "tool_calls" and "function_call"')
            message["tool_calls"] = calls_of(rest[name], where)
    thoughts = [reasoning] if reasoning.strip() else []
    for name in REASONING:
        value = rest.get(name)
        if value is None or value is False:
            continue
        if not isinstance(value, str):
            raise BadRecordError("wrong type", f"{where} has {shown(name)} that is {json_type(value)}, not text")
        if value.strip() and value not in thoughts:
            thoughts.append(value)
    if len(thoughts) > 1:
        raise BadRecordError("wrong type", f"{where} has more than one text of reasoning")
    if thoughts:  # templates look for it under different names
        message.update(dict.fromkeys(REASONING, thoughts[0]))
    refusal = rest.get("refusal")
    if refusal is not None:
        texts = [message["content"], content_of(refusal, f'the "refusal" of {where}').text]
        message["content"] = style.join.join(text for text in texts if text)


def _add_rest(
    message: dict[str, Any], rest: dict[str, Any], where: str, style: ReadingStyle, found: Conversation
) -> None:
    """Fields that a template may know, and those that nobody reads."""
    answers = message["role"] == "assistant"
    for name, value in rest.items():
        if value in (None, "", [], {}) or is_flag(name) or (answers and name in (*REASONING, "refusal", "tool_calls")):
            continue
        if name == "function_call" and answers:
            continue
        if name in ("tool_calls", "function_call"):
            raise BadRecordError("wrong type", f"{where} has {shown(name)}, and is no answer")
        if name in ("tools", "functions"):
            if message["role"] not in ("system", "developer") or found.tools:
                raise BadRecordError("wrong type", f"{where} has {shown(name)}; they belong beside the messages")
            found.tools = tools_of(value, f"{shown(name)} of {where}")
        elif name in _KEPT or (name in style.names and name not in _READ):
            message[name] = value
            if name != "tool_call_id" and name not in style.names:
                found.note(unused(f"{name} of messages"))
        elif name not in METADATA:
            found.note(unused(f"{name} of messages"))


def _without(content: Any) -> str:
    return "that is null" if content is None else "without a text"


def _known() -> str:
    return "known are system, developer, user, assistant and tool"
