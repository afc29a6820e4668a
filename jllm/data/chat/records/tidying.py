"""What of a conversation's messages is joined, and what is left out.

Consecutive texts of one role are joined: of users, of the system, and of the assistant where there are no calls. What
stands before the first question, or behind the last answer (or text that a flag says to train on), is left out, and
counted.

Guarantees: an answer that says nothing makes its record bad.
"""

import functools
import itertools
from typing import Any

from jllm.data.chat.records.conversation import LEFT_OUT, BadRecordError, Conversation, ReadingStyle
from jllm.data.chat.records.messages import REASONING

_TEXT = frozenset(("role", "content"))
_BEHIND = f"{LEFT_OUT}messages after the last answer"
_JOINED = frozenset(("system", "developer", "user", "assistant"))
_SAID = frozenset((*_TEXT, *REASONING))


def tidy(given: Conversation, style: ReadingStyle) -> Conversation:
    """The conversation, from its first question to its last answer.

    Raises:
        BadRecordError: there is no answer to train on, or an answer is empty.
    """
    last = _tidy_up_to(given.roles)
    if last:
        if last < len(given.roles):
            given.messages, given.trained, given.refused = (
                given.messages[:last],
                given.trained[:last],
                given.refused[:last],
            )
            given.note(_BEHIND, len(given.roles) - last)
        return given
    found = Conversation(messages=[], trained=[], refused=[], tools=given.tools, notes=given.notes)
    messages, trained, refused = found.messages, found.trained, found.refused
    last = len(given.messages)
    while last and given.messages[last - 1]["role"] != "assistant" and not given.trained[last - 1]:
        last -= 1
    asked, early = False, 0
    for number in range(last):
        message, counts, refuses = given.messages[number], given.trained[number], given.refused[number]
        role = message["role"]
        if role == "assistant":
            if not asked:
                early += 1
                continue
            _require_answer(message, number)
        asked = asked or role in ("user", "tool")
        if messages and role == messages[-1]["role"] and role in _JOINED:
            previous = messages[-1]
            alike = counts == trained[-1] and refuses == refused[-1]
            if alike and message.keys() == _TEXT and previous.keys() <= _SAID:
                texts = [text for text in (previous["content"], message["content"]) if text]
                messages[-1] = {**previous, "content": style.join.join(texts)}
                continue
        messages.append(message)
        trained.append(counts)
        refused.append(refuses)
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRecordError("no answer", "no assistant message after a question")
    if not any(trained):
        raise BadRecordError("no answer", "no assistant message that is trained on")
    if early:
        found.note(f"{LEFT_OUT}answers before the first question", early)
    if last < len(given.messages):
        found.note(_BEHIND, len(given.messages) - last)
    return found


def _require_answer(message: dict[str, Any], number: int) -> None:
    says = message["content"].strip() or message.get("tool_calls") or message.get(REASONING[0])
    if message["role"] == "assistant" and not says:
        raise BadRecordError("empty answer", f"message {number} is an answer that says nothing")


@functools.lru_cache(maxsize=4096)
def _tidy_up_to(roles: tuple[str, ...]) -> int:
    """How many of messages of these roles, texts without flags, are the conversation: up to the last answer. 0 where
    some are joined, or left out before the first question, or there is no answer."""
    last = len(roles)
    while last and roles[last - 1] != "assistant":
        last -= 1
    if any(one == other and one in _JOINED for one, other in itertools.pairwise(roles[:last])):
        return 0
    return last if next((role for role in roles if role in ("user", "tool", "assistant")), "") != "assistant" else 0
