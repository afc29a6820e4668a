"""Fields beside a conversation: system text, tools, flags, labels, and those nobody reads.

Guarantees: each field is used, counted by its name, or says why the record is refused.
"""

import dataclasses
from collections.abc import Collection
from typing import Any

from jllm.data.chat.records.calls import tools_of
from jllm.data.chat.records.content import text_of
from jllm.data.chat.records.conversation import LEFT_OUT, BadRecordError, Conversation, ReadingStyle, shown, unused
from jllm.data.chat.records.flags import flag_of, is_flag, is_measured
from jllm.data.chat.records.messages import METADATA

SYSTEM = ("system", "system_prompt", "system_message")
TOOLS = ("tools", "functions")
LABELS = ("label", "kto_tag")
"""Where data of judged answers say whether an answer is a good one."""


def with_fields(record: dict[str, Any], used: Collection[str], given: Conversation) -> Conversation:
    """The conversation with what its record says beside it.

    Args:
        used: fields that the conversation was made of.

    Raises:
        BadRecordError: a field is not what its name says, or says that the record is not to be trained on.
    """
    rest = {name: value for name, value in record.items() if name not in used and value not in (None, "", [], {})}
    if not rest:
        return given
    for name in LABELS:
        if rest.get(name) is False:
            raise BadRecordError("no answer", f"its {shown(name)} is false: not an answer to train on")
        if rest.get(name) is True:
            del rest[name]
    said = flag_of({name: value for name, value in rest.items() if not is_measured(name, value)}, "the record")
    if said is False:
        raise BadRecordError("no answer", "a flag of the record says that it is not trained on")
    texts: list[str] = []
    for name, value in rest.items():
        if name in SYSTEM and given.completion is None:
            text = text_of(value, shown(name))
            texts += [text] if text.strip() and text not in texts else []
        elif name in TOOLS and given.completion is None:
            tools = tools_of(value, f'"{name}"')
            if given.tools and tools and tools != given.tools:
                raise BadRecordError("wrong type", "it has tools in two places")
            given.tools = tools or given.tools
        elif (not is_flag(name) or is_measured(name, value)) and name not in METADATA:
            given.note(unused(name))
    return _with_system(given, texts)


def without_ignored_tools(given: Conversation, style: ReadingStyle) -> Conversation:
    """The conversation without its tools, where the user says so."""
    if not given.tools or not style.ignore_tools:
        return given
    given.note(f"{LEFT_OUT}lists of tools (--ignore_tools)")
    return dataclasses.replace(given, tools=None)


def _with_system(given: Conversation, texts: list[str]) -> Conversation:
    """The system's texts in front, those that it says already left out."""
    said = [message["content"] for message in given.messages if message["role"] == "system"]
    new = [{"role": "system", "content": text} for text in texts if text not in said]
    if new:
        given.roles = ()
        given.messages = new + given.messages
        given.trained = [False] * len(new) + given.trained
        given.refused = [False] * len(new) + given.refused
    return given
