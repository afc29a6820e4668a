"""What every chat format is read into, and how its reading may be asked for.

Guarantees: plain data, which travels to worker processes.
"""

import dataclasses
import json
from typing import Any

from jllm.errors import printable


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
        refused: for each message, whether a flag says that it must not be trained on.
        tools: tool descriptions for the template, or None.
        completion: instead of messages: the prompt and its completion.
        notes: what was left out of the record, by name, and how often.
        roles: of the messages, where all are nothing but texts that say something, and no flag was met.
    """

    messages: list[dict[str, Any]]
    trained: list[bool]
    refused: list[bool]
    tools: list[Any] | None = None
    completion: tuple[str, str] | None = None
    notes: dict[str, int] = dataclasses.field(default_factory=dict)
    roles: tuple[str, ...] = ()

    def note(self, what: str, times: int = 1) -> None:
        """Count what is left out."""
        self.notes[what] = self.notes.get(what, 0) + times


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadingStyle:
    """What of reading depends on the template and the options.

    Attributes:
        names: what the template mentions: roles and fields of messages that only it knows are kept.
        developer_as_system: the template knows no developer; what one says is the system's.
        join: between the texts of consecutive messages of one role.
        ignore_tools: tools are left out.
    """

    names: frozenset[str] = frozenset()
    developer_as_system: bool = False
    join: str = "\n\n"
    ignore_tools: bool = False


LEFT_OUT = "left out: "
"""Begins the names of what is counted because it was left out."""
UNUSED = "unused field: "
"""Begins the names of fields that are counted because nothing was made of them."""
MORE = f"{UNUSED}(others)"
"""Where a chunk of records has more names than anybody reads, the rest of them."""


def unused(name: object) -> str:
    """The name under which an unused field is counted: its own, cut where it is long, on one line."""
    return f"{UNUSED}{shown(str(name))[1:-1]}"


def shown(value: object) -> str:
    """A value out of a record for a message: as JSON, short, on one line, without control codes."""
    text = printable(json.dumps(value, ensure_ascii=False, default=str))
    if len(text) <= 48:
        return text
    return f'{text[:44]}..."' if isinstance(value, str) else f"{text[:45]}..."
