"""Whether a template shows all of a conversation: messages, calls, reasoning, tools.

A template is tried with texts that nothing else can hold, in messages of the same roles, fields and numbers of calls;
what does not come out is not shown. Tried once for each such shape. What depends on the texts themselves (arguments of
calls, think blocks, a message that is left out because of a word in it) is looked up in what the template made of
them: each message behind the one before.

Guarantees: a conversation of which a template leaves out a message, call or tool is refused by name. Reasoning of
earlier turns may be left out by a template that shows the last one's, and is counted; so is a message of which the
template shows some, but not all.
Cost: one rendering for each shape; a look-up for each message.
"""

import functools
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jllm.data.chat.marks import FIRST_STAND_IN, LAST_STAND_IN
from jllm.data.chat.records.conversation import BadRecordError, shown
from jllm.data.chat.records.messages import REASONING

Messages = Sequence[Mapping[str, Any]]
_SHAPES_KEPT = 4096
_CLOSED = "</think>"
_MOVED = frozenset(("system", "developer"))
_PIECE = 16
"""So many letters of a message in a row are found nowhere by chance."""
_TEXT, _THOUGHT, _CALL, _TOOL, _NAME = "text", "thought", "call", "tool", "name"


class Completeness:
    """What one template shows. Not shared between threads.

    Args:
        render: messages and tools to text.
    """

    def __init__(self, render: Callable[[Messages, list[Any] | None], str]) -> None:
        self._render = render
        self._shapes: dict[Any, tuple[tuple[str, int], ...] | None] = {}

    def thoughts_left_out(self, messages: Messages, tools: list[Any] | None) -> frozenset[int]:
        """The numbers of the messages whose reasoning the template leaves out because they are of earlier turns.

        Raises:
            BadRecordError: the template leaves out anything else.
        """
        missing = self._left_out(messages, tools)
        if not missing:
            return frozenset()
        last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
        left_out = set()
        for what, number in missing:
            if what == _NAME:
                continue
            if what == _TOOL:
                raise BadRecordError(
                    "tools not shown", "the template does not show its tools; leave them out with --ignore_tools"
                )
            message = messages[number]
            if what == _CALL:
                name = _names(message)[0]
                raise BadRecordError(
                    "tool call not found",
                    f"the template does not show a tool call of an answer ({shown(name)}, message {number})",
                )
            if what == _TEXT:
                raise BadRecordError(
                    "message not shown", f"the template does not show message {number}, of the role {message['role']}"
                )
            if number > last or not self._knows_reasoning(_CLOSED in message["content"]):
                raise BadRecordError(
                    "reasoning not shown", f"the template does not show the reasoning of message {number}"
                )
            rest = message["content"].partition(_CLOSED)[2] if _CLOSED in message["content"] else message["content"]
            if not rest.strip() and not message.get("tool_calls"):
                raise BadRecordError(
                    "empty answer", f"message {number} is nothing but reasoning, which the template leaves out"
                )
            left_out.add(number)
        return frozenset(left_out)

    def names_left_out(self, messages: Messages, tools: list[Any] | None) -> int:
        """Of how many messages the template does not show the name of who speaks."""
        return sum(what == _NAME for what, _ in self._left_out(messages, tools) or ())

    def require_in(self, text: str, messages: Messages, tools: list[Any] | None, left_out: frozenset[int]) -> int:
        """Look up what the shape of a conversation cannot tell.

        Args:
            text: what the template made of the messages.
            left_out: messages whose reasoning need not be there.

        Returns:
            Of how many messages the template shows some, and not all.

        Raises:
            BadRecordError: something is not there.
        """
        at, changed = 0, 0
        for number, message in enumerate(messages):
            content = message["content"]
            for call in message.get("tool_calls") or ():
                function = call["function"]
                for value in (function["name"], *_leaves(function["arguments"])):
                    if not _is_in(value, text):
                        raise BadRecordError(
                            "tool call not found",
                            f"the template does not show a tool call of an answer as it is ({shown(value)})",
                        )
            if message["role"] == "assistant" and _CLOSED in content:
                before, _, rest = content.partition(_CLOSED)
                outside, _, thought = before.rpartition("<think>")
                expected = [outside, rest] if number in left_out else [outside, thought, rest]
                if not all(part.strip() in text for part in expected):
                    raise BadRecordError(
                        "message not shown", f"the template does not show all that is around {_CLOSED} in an answer"
                    )
                content = rest
            elif number not in left_out and not _shows_some(text, (message.get(REASONING[0]) or "").strip()):
                raise BadRecordError(
                    "reasoning not shown", f"the template does not show the reasoning of message {number}"
                )
            content = content.strip()
            # What the system says may be moved: into the first question, or the last.
            first = 0 if message["role"] in _MOVED else at
            found = text.find(content, first)
            if found >= 0:
                at = at if message["role"] in _MOVED else found + len(content)
            elif not _shows(text[first:], content):
                if not _shows_some(text[first:], content):
                    raise BadRecordError(
                        "message not shown",
                        f"the template does not show message {number}, of the role {message['role']}"
                        f" ({shown(content)})",
                    )
                changed += 1
        for tool in tools or ():
            if _is_function(tool) and not _is_in(tool["function"]["name"], text):
                raise BadRecordError("tools not shown", "the template does not show a tool as it is")
        return changed

    def _left_out(self, messages: Messages, tools: list[Any] | None) -> tuple[tuple[str, int], ...] | None:
        key = (tuple(map(_shape, messages)), tuple(map(_is_function, tools or ())))
        if key not in self._shapes:
            if len(self._shapes) > _SHAPES_KEPT:
                self._shapes.clear()
            self._shapes[key] = self._missing(messages, tools)
        return self._shapes[key]

    def _missing(self, messages: Messages, tools: list[Any] | None) -> tuple[tuple[str, int], ...] | None:
        """What of messages of this shape does not come out, in order; None where the template shows that only for the
        texts that there are."""
        gaps = _Gaps()
        canary = [_canary(message, number, gaps) for number, message in enumerate(messages)]
        described = [_described(tool, number, gaps) for number, tool in enumerate(tools or ())] or None
        try:
            text = self._render(canary, described)
        except BadRecordError:
            return None
        missing = [place for gap, place in gaps.places.items() if gap not in text]
        return tuple(dict.fromkeys(missing))

    @functools.cache  # noqa: B019 - lives as long as the template
    def _knows_reasoning(self, inside: bool) -> bool:
        """Whether the template shows the reasoning of the last answer, given in its content or beside it."""
        thought = "a\ue010a"
        answer: dict[str, Any] = {"role": "assistant", "content": "b"}
        if inside:
            answer["content"] = f"<think>\n{thought}\n</think>\n\nb"
        else:
            answer.update(dict.fromkeys(REASONING, thought))
        try:
            return thought in self._render([{"role": "user", "content": "a"}, answer], None)
        except BadRecordError:
            return False


class _Gaps:
    """Texts that nothing else holds, and what each stands for."""

    def __init__(self) -> None:
        self.places: dict[str, tuple[str, int]] = {}

    def take(self, what: str, number: int) -> str:
        """A new text for something of this message or tool."""
        size = LAST_STAND_IN - FIRST_STAND_IN
        first, second = divmod(len(self.places), size)
        gap = f"{chr(FIRST_STAND_IN + second)}{chr(FIRST_STAND_IN + first)}"
        self.places[gap] = (what, number)
        return f"a{gap}a"  # a template may write letters in its own way


def _shape(message: Mapping[str, Any]) -> tuple[Any, ...]:
    content = message["content"]
    if len(message) == 2 and _CLOSED not in content:
        return message["role"], bool(content)
    before, closed, rest = content.partition(_CLOSED)
    thought = closed and before.rpartition("<think>")[2].strip()
    calls = len(message.get("tool_calls") or ())
    return message["role"], bool(content), bool(closed), bool(thought), bool(rest.strip()), calls, *message


def _canary(message: Mapping[str, Any], number: int, gaps: _Gaps) -> Mapping[str, Any]:
    """A message of the same shape, with texts that nothing else holds."""
    content = message["content"]
    canary = dict(message)
    if message["role"] == "assistant" and _CLOSED in content:
        before, _, rest = content.partition(_CLOSED)
        thought = before.rpartition("<think>")[2]
        inside = gaps.take(_THOUGHT, number) if thought.strip() else ""
        outside = gaps.take(_TEXT, number) if rest.strip() else ""
        canary["content"] = f"<think>\n{inside}\n</think>\n\n{outside}"
    elif content.strip():
        canary["content"] = gaps.take(_TEXT, number)
    if message.get(REASONING[0]):
        canary.update(dict.fromkeys(REASONING, gaps.take(_THOUGHT, number)))
    if isinstance(message.get("name"), str):
        canary["name"] = gaps.take(_NAME, number)
    if message.get("tool_calls"):
        canary["tool_calls"] = [
            {**call, "function": {"name": gaps.take(_CALL, number), "arguments": {"x": gaps.take(_CALL, number)}}}
            for call in message["tool_calls"]
        ]
    return canary


def _is_function(tool: Any) -> bool:
    return isinstance(tool, dict) and isinstance(tool.get("function"), dict)


def _described(tool: Any, number: int, gaps: _Gaps) -> Any:
    if not _is_function(tool):
        return tool
    properties = {gaps.take(_TOOL, number): {"type": "string", "description": "x"}}
    return {
        "type": "function",
        "function": {
            "name": gaps.take(_TOOL, number),
            "description": gaps.take(_TOOL, number),
            "parameters": {"type": "object", "properties": properties, "required": list(properties)},
        },
    }


def _names(message: Mapping[str, Any]) -> list[str]:
    return [call["function"]["name"] for call in message["tool_calls"]]


def _leaves(value: Any) -> Iterator[Any]:
    """The keys and values of arguments that are neither objects nor lists."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _leaves(item)
    elif isinstance(value, list):
        yield from itertools.chain.from_iterable(map(_leaves, value))
    else:
        yield value


def _is_in(value: Any, text: str) -> bool:
    """Whether a text shows a value, as it is or in one of the ways in which JSON and Python write it."""
    if isinstance(value, str):
        value = value.strip()
        if value in text:
            return True
        ways = (json.dumps(value, ensure_ascii=False), json.dumps(value), repr(value))
        return any(way[1:-1] in text for way in ways)
    return any(re.search(rf"(?<!\w){re.escape(way)}(?!\w)", text) for way in (json.dumps(value), repr(value)))


def _shows(text: str, content: str) -> bool:
    """Whether a text shows a message in one of the ways in which JSON and Python write it, or in other capitals."""
    return _is_in(content, text) or content.casefold() in text.casefold()


def _shows_some(text: str, content: str) -> bool:
    """Whether a text shows some of a message: half of it where it is short, a piece of it where it is not."""
    if not content:  # which is asked of most messages, and their text is long
        return True
    text, content = text.casefold(), content.casefold()
    size = max(1, min(_PIECE, (len(content) + 1) // 2))
    return any(content[at : at + size] in text for at in range(0, len(content) - size + 1, size))
