"""From the messages of a record to the conversation that is rendered: what is joined, what is left out.

Consecutive texts of one role are joined: of users, of the system, and of the assistant where there are no calls. What
stands before the first question and behind the last answer is left out, and counted.

Guarantees: an answer that says nothing makes its record bad.
"""

from jllm.data.chat.records.conversation import LEFT_OUT, BadRecordError, Conversation, ReadingStyle
from jllm.data.chat.records.messages import REASONING

_TEXT = frozenset(("role", "content"))
_JOINED = frozenset(("system", "developer", "user", "assistant"))
_SAID = frozenset((*_TEXT, *REASONING))


def tidy(given: Conversation, style: ReadingStyle) -> Conversation:
    """The conversation, from its first question to its last answer.

    Raises:
        BadRecordError: there is no answer to train on, or an answer is empty.
    """
    found = Conversation(messages=[], trained=[], refused=[], tools=given.tools, notes=given.notes)
    messages, trained, refused = found.messages, found.trained, found.refused
    last = len(given.messages)
    while last and given.messages[last - 1]["role"] != "assistant":
        last -= 1
    asked, early = False, 0
    for number in range(last):
        message, counts, refuses = given.messages[number], given.trained[number], given.refused[number]
        role = message["role"]
        if role == "assistant":
            if not asked:
                early += 1
                continue
            content = message["content"]
            if (not content or content.isspace()) and not message.get("tool_calls") and not message.get(REASONING[0]):
                raise BadRecordError("empty answer", f"message {number} is an answer that says nothing")
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
    if not messages or messages[-1]["role"] != "assistant":
        raise BadRecordError("no answer", "no assistant message after a question")
    if not any(trained):
        raise BadRecordError("no answer", "no assistant message that is trained on")
    if early:
        found.note(f"{LEFT_OUT}answers before the first question", early)
    if last < len(given.messages):
        found.note(f"{LEFT_OUT}messages after the last answer", len(given.messages) - last)
    return found
