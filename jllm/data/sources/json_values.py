"""JSON values out of their bytes, each alone, so that a bad one costs itself.

Guarantees: what the standard library reads is read (NaN, large numbers); text with half of a surrogate pair is bad.
Cost: orjson's; a Python object for each value.
"""

from collections.abc import Sequence
from typing import Any

from jllm.data.sources import long_texts
from jllm.data.sources.records import BadRecord, Records, field_of, path_of
from jllm.guards import notation


def parse(rows: Sequence[bytes | memoryview], numbers: Sequence[int], *, long_field: str | None = None) -> Records:
    """The value of each row, blank rows passed over; `numbers` are the rows' lines, or places in a list.

    Args:
        long_field: long strings may be `LongText`. That in this field, with dots, is read by the caller alone: where it
            is broken, so is the record.
    """
    import orjson

    values: list[Any] = []
    lines: list[int] = []
    bad: list[BadRecord] = []
    loads = orjson.loads
    for row, number in zip(rows, numbers, strict=True):
        try:
            if long_field is not None and len(row) > long_texts.LONG:
                value = _with_long_texts(row, long_field)
            else:
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


def _with_long_texts(row: bytes | memoryview, field: str) -> Any:
    import orjson

    try:
        value, texts = long_texts.parse(memoryview(row))
        read_later = field_of(value, path_of(field))
        for text in texts:
            if text is not read_later:
                text.check()
    except ValueError:
        return orjson.loads(row)
    return value


def _tolerant(row: bytes, number: int, message: str, bad: list[BadRecord]) -> Any:
    """What orjson refuses and the standard library reads; None where the record is bad."""
    import json

    try:
        text = row.decode().removeprefix("\ufeff")  # where a file with such a mark was put behind another
    except UnicodeDecodeError as error:
        bad.append(BadRecord(kind="not UTF-8", line=number, detail=f"byte {error.start}: {error.reason}"))
        return None
    try:
        value = notation.loads(text)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        bad.append(BadRecord(kind="not UTF-8", line=number, detail="half of a surrogate pair"))
        return None
    except (ValueError, RecursionError):
        bad.append(BadRecord(kind="bad JSON", line=number, detail=message))
        return None
    return value
