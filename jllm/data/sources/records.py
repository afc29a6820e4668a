"""Records: documents or JSON values, with their lines; and the texts in them.

Guarantees: a bad record becomes a `BadRecord` with its line and never changes its neighbours.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from jllm.data.sources.long_texts import LongText
from jllm.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class BadRecord:
    """A record that could not be used: what is wrong with it, and where it starts (1-based line, or row, or
    element)."""

    kind: str
    line: int
    detail: str


class RefusedRecordError(UserError):
    """A record that the options do not allow, and with it the run.

    Args:
        before, after: the message around the record's place.
        line: where the record is in what it was read from.
        name: of its source, where that is known here.
    """

    def __init__(self, before: str, line: int, after: str, *, name: str | None = None) -> None:
        super().__init__(f"{before} {f'line {line}' if name is None else f'{name}:{line}'} {after}")
        self.before, self.line, self.after, self.name = before, line, after, name

    def __reduce__(self) -> tuple[Any, ...]:
        return _refused, (self.before, self.line, self.after, self.name)

    def of(self, name: str | None) -> "RefusedRecordError":
        """The same of a source of this name."""
        return RefusedRecordError(self.before, self.line, self.after, name=name)

    def behind(self, line: int) -> "RefusedRecordError":
        """The same where what it was found in begins at this line."""
        return RefusedRecordError(self.before, self.line + line - 1, self.after, name=self.name)


def _refused(before: str, line: int, after: str, name: str | None) -> RefusedRecordError:
    return RefusedRecordError(before, line, after, name=name)


LARGEST_RECORD = 128 << 20
"""Bytes of the largest record, decompressed, where nothing else is asked for. Reading one takes some times its size."""


def too_large(most: int, line: int, *, name: str | None = None) -> RefusedRecordError:
    """What is said of a record that is larger than `--max_record` allows, which is `most` bytes."""
    after = f"has more than {most:,} bytes; raise --max_record, or leave the record out"
    return RefusedRecordError("--max_record: the one at", line, after, name=name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Records:
    """The records of one chunk in order, and what was bad: `values[i]` was found at line `lines[i]`."""

    values: list[Any]
    lines: list[int]
    bad: list[BadRecord]


def path_of(field: str) -> list[str]:
    """A field as the steps to it: "a.0.b" and "a[0].b" are "a", "0" and "b"."""
    return re.sub(r"\[(-?\d+)\]", r".\1", field).split(".")


def field_of(value: Any, path: Sequence[str]) -> Any:
    """`value["a"]["b"]` for the path ("a", "b"); None where something on the way is missing.

    Steps into lists are numbers, negative ones from the end. A key that itself contains dots is found too.
    """
    if isinstance(value, dict) and len(path) > 1 and ".".join(path) in value:
        return value[".".join(path)]
    for key in path:
        if isinstance(value, list) and re.fullmatch(r"-?\d{1,9}", key) and -len(value) <= int(key) < len(value):
            value = value[int(key)]
        elif isinstance(value, dict):
            value = value.get(key)
        else:
            return None
    return value


def _has_null(value: Any, path: Sequence[str]) -> bool:
    """Whether the field is there, and null."""
    if isinstance(value, dict) and ".".join(path) in value:
        return True
    *above, last = path
    inside = field_of(value, above) if above else value
    return isinstance(inside, dict) and last in inside


def json_type(value: Any) -> str:
    """What JSON calls the type of a value."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def texts_of(records: Records, kind: str, field: str) -> Records:
    """The documents of pretraining records: the texts themselves, or the text in each record's `field`, a `str` or a
    `LongText` as it is there."""
    if kind == "text":
        return records
    path = path_of(field)
    values: list[Any] = []
    lines: list[int] = []
    bad = list(records.bad)
    for record, line in zip(records.values, records.lines, strict=True):
        text = field_of(record, path)
        if isinstance(text, LongText):
            values.append(text)
            lines.append(line)
        elif isinstance(text, str):
            if text and not text.isspace():
                values.append(text)
                lines.append(line)
            else:
                bad.append(BadRecord(kind="empty document", line=line, detail=f'field "{field}" has no text'))
        elif text is None and _has_null(record, path):
            bad.append(BadRecord(kind="empty document", line=line, detail=f'"{field}" is null'))
        elif text is None:
            keys = ", ".join(map(str, record)) if isinstance(record, dict) else json_type(record)
            bad.append(BadRecord(kind="missing field", line=line, detail=f'no "{field}" (there is: {keys[:80]})'))
        else:
            detail = f'"{field}" is {json_type(text)}, not text'
            bad.append(BadRecord(kind="wrong type", line=line, detail=detail))
    bad.sort(key=lambda record: record.line)
    return Records(values=values, lines=lines, bad=bad)
