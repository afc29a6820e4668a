"""The records of a block: documents or JSON values, with their lines.

Guarantees: a bad record becomes a `BadRecord` with its line and never changes its neighbours.
Cost: orjson's; a Python object for each record.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from jllm.data.sources.blocks import Block, line_ends


@dataclasses.dataclass(frozen=True, kw_only=True)
class BadRecord:
    """A record that could not be used: what is wrong with it, and where it starts (1-based line, or row, or
    element)."""

    kind: str
    line: int
    detail: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Records:
    """The records of one block in order, and what was bad: `values[i]` was found at line `lines[i]`."""

    values: list[Any]
    lines: list[int]
    bad: list[BadRecord]


def parse_block(block: Block, kind: str) -> Records:
    """The records of a block: texts for a text source, JSON values for the others.

    Runs on any thread; nothing but the block is looked at.
    """
    if kind == "text":
        return _parse_text(block.content, block.line)
    if kind == "parquet":
        from jllm.data.sources.tables import parse_table

        return parse_table(block)
    content = block.content
    rows = content if isinstance(content, list) else _lines(content)
    return _parse_json(rows, range(block.line, block.line + len(rows)))


def _lines(data: bytes) -> list[memoryview]:
    """The lines of `data`, without copies and without what splits them: half the time of `bytes.split`."""
    whole, ends = memoryview(data), line_ends(data).tolist()
    starts = [0, *(end + 1 for end in ends)]
    return [whole[start:end] for start, end in zip(starts, [*ends, len(data)], strict=True)]


def _parse_json(rows: Sequence[bytes | memoryview], numbers: Sequence[int]) -> Records:
    import orjson

    values: list[Any] = []
    lines: list[int] = []
    bad: list[BadRecord] = []
    loads = orjson.loads
    for row, number in zip(rows, numbers, strict=True):
        try:
            value = loads(row)
        except orjson.JSONDecodeError as error:
            text = bytes(row)
            if not text or text.isspace():
                continue
            value = _tolerant(text, number, str(error), bad)
            if value is None:
                continue
        values.append(value)
        lines.append(number)
    return Records(values=values, lines=lines, bad=bad)


def _tolerant(row: bytes, number: int, message: str, bad: list[BadRecord]) -> Any:
    """What orjson refuses and the standard library reads (NaN, large numbers); None where the record is bad."""
    import json

    try:
        text = row.decode()
    except UnicodeDecodeError as error:
        bad.append(BadRecord(kind="not UTF-8", line=number, detail=f"byte {error.start}: {error.reason}"))
        return None
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        bad.append(BadRecord(kind="not UTF-8", line=number, detail="half of a surrogate pair"))
        return None
    except (ValueError, RecursionError):
        bad.append(BadRecord(kind="bad JSON", line=number, detail=message))
        return None
    return value


_BETWEEN_DOCUMENTS = re.compile(r"\n(?:[^\S\n]*\n)+")
_LEADING_BLANK = re.compile(r"(?:[^\S\n]*\n)+")


def _parse_text(data: bytes, line: int) -> Records:
    """Documents of a text block: what stands between blank lines, without the line ends around it."""
    try:
        text, clean = data.decode(), True
    except UnicodeDecodeError:
        text, clean = data.decode(errors="surrogateescape"), False
    leading = _LEADING_BLANK.match(text)
    start = leading.end() if leading else 0
    documents: list[str] = []
    lines: list[int] = []
    bad: list[BadRecord] = []
    counted = 0
    pieces: list[tuple[int, int]] = []
    for separator in _BETWEEN_DOCUMENTS.finditer(text, start):
        pieces.append((start, separator.start()))
        start = separator.end()
    pieces.append((start, len(text)))
    for begin, end in pieces:
        document = text[begin:end]
        line += text.count("\n", counted, begin)
        counted = begin
        document = document.removesuffix("\n").removesuffix("\r")
        if not document or document.isspace():
            continue
        if not clean and re.search("[\udc80-\udcff]", document):
            bad.append(BadRecord(kind="not UTF-8", line=line, detail="bytes that are no UTF-8 text"))
            continue
        documents.append(document)
        lines.append(line)
    return Records(values=documents, lines=lines, bad=bad)


def field_of(value: Any, path: Sequence[str]) -> Any:
    """`value["a"]["b"]` for the path ("a", "b"); None where something on the way is missing.

    A key that itself contains dots is found too.
    """
    if isinstance(value, dict) and len(path) > 1 and ".".join(path) in value:
        return value[".".join(path)]
    for key in path:
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value


def texts_of(records: Records, kind: str, field: str) -> Records:
    """The documents of pretraining records: the texts themselves, or the text in each record's `field`."""
    if kind == "text":
        return records
    path = field.split(".")
    values: list[Any] = []
    lines: list[int] = []
    bad = list(records.bad)
    for record, line in zip(records.values, records.lines, strict=True):
        text = field_of(record, path)
        if isinstance(text, str):
            if text and not text.isspace():
                values.append(text)
                lines.append(line)
            else:
                bad.append(BadRecord(kind="empty document", line=line, detail=f'field "{field}" has no text'))
        elif text is None:
            keys = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
            bad.append(BadRecord(kind="missing field", line=line, detail=f'no "{field}" (there is: {keys[:80]})'))
        else:
            detail = f'"{field}" is {type(text).__name__}, not text'
            bad.append(BadRecord(kind="wrong type", line=line, detail=detail))
    bad.sort(key=lambda record: record.line)
    return Records(values=values, lines=lines, bad=bad)
