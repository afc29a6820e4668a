"""Batches of Spark's as parts of sources, with the places of their records."""

import gzip
import json
from typing import Any

import pyarrow as pa
import pytest

from jllm.data.sources.inputs import Source
from jllm.data.sources.parsing import parse_chunk
from jllm.data.spark.encoding import GivenSources, Part
from jllm.data.spark.findings import Findings
from jllm.data.spark.sources import FILE, LINES, NUMBER, ROWS, START, VALUE, WHOLE
from jllm.errors import UserError


def given(reading: str, *kinds: tuple[str, str | None]) -> GivenSources:
    sources = tuple(
        Source(path=f"/d/{i} %41", name=f"{i}", stem="s", kind=kind, compression=compression, size=9)
        for i, (kind, compression) in enumerate(kinds)
    )
    return GivenSources(sources=sources, numbers={f"d/{i} %41": i for i in range(len(kinds))}, reading=reading)


def parsed(part: Part) -> list[tuple[Any, Any]]:
    records = parse_chunk(part.chunk, part.kind)
    good = list(zip(map(part.place, records.lines), records.values, strict=True))
    return sorted([*good, *((part.place(bad.line), bad.kind) for bad in records.bad)], key=lambda item: item[0])


def test_lines_of_several_sources() -> None:
    """Names come in codes; bad lines and blank ones leave the places of the others alone."""
    batch = pa.RecordBatch.from_pydict(
        {
            FILE: ["file:/d/0%20%2541"] * 3 + ["file:/d/1%20%2541"] * 2,
            START: [0, 0, 64, 0, 0],
            NUMBER: [10, 11, 12, 5, 6],
            VALUE: [b'{"a": 1}', b"", b'{"a": 2}', b"no", b'{"a": 3}\r'],
        }
    )
    parts = list(given(LINES, ("jsonl", None), ("jsonl", None)).chunks(batch))
    assert [part.chunk.source for part in parts] == [0, 1]
    assert parsed(parts[0]) == [((0, 0, 10), {"a": 1}), ((0, 64, 12), {"a": 2})]
    assert [place for place, _ in parsed(parts[1])] == [(1, 0, 5), (1, 0, 6)]
    findings = Findings()
    for part in parts:
        part.tell(findings)
    assert findings.parts == {(0, 0): (10, 11), (0, 64): (12, 12), (1, 0): (5, 6)}


def test_rows_keep_their_columns() -> None:
    columns = {FILE: ["file:/d/0%20%2541"] * 2, START: [0, 0], NUMBER: [0, 1], "text": ["a", None], "n": [1, 2]}
    (part,) = given(ROWS, ("parquet", None)).chunks(pa.RecordBatch.from_pydict(columns))
    assert parsed(part) == [((0, 0, 0), {"text": "a", "n": 1}), ((0, 0, 1), {"text": None, "n": 2})]


def test_whole_files_are_cut_as_locally() -> None:
    listed = json.dumps([{"a": 1}, {"a": 2}]).encode()
    batch = pa.RecordBatch.from_pydict({FILE: ["file:/d/0 %41"], VALUE: [gzip.compress(listed)]})
    (part,) = given(WHOLE, ("json", "gzip")).chunks(batch)
    assert parsed(part) == [((0, 0, 1), {"a": 1}), ((0, 0, 2), {"a": 2})]


def test_a_damaged_file_is_named() -> None:
    cut = gzip.compress(b'{"a": 1}\n' * 99)[:-9]
    batch = pa.RecordBatch.from_pydict({FILE: ["file:/d/0 %41"], VALUE: [cut]})
    with pytest.raises(UserError, match=r"^-i /d/0 %41: cannot be read: "):
        list(given(WHOLE, ("jsonl", "gzip")).chunks(batch))


def test_sources_without_files() -> None:
    sources = (Source(path="table", name="table", stem="data", kind="parquet", compression=None, size=None),)
    whole = GivenSources(sources=sources, numbers={}, reading=ROWS)
    batch = pa.RecordBatch.from_pydict({FILE: ["x:/1", "x:/2"], START: [0, 0], NUMBER: [3, 4], "text": ["a", "b"]})
    (part,) = whole.chunks(batch)
    assert [value["text"] for _, value in parsed(part)] == ["a", "b"]
