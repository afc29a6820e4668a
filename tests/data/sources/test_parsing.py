"""A chunk of any format to the same records."""

import json
from typing import Any

import pyarrow as pa
import pytest

from jllm.data.sources.chunk import Chunk
from jllm.data.sources.parsing import parse_chunk

RECORDS = [{"text": "one"}, {"text": "two\n\nlines"}]


@pytest.mark.parametrize(
    ("kind", "data", "wanted"),
    [
        ("text", b"one\n\ntwo\n", ["one", "two"]),
        ("jsonl", "".join(json.dumps(record) + "\n" for record in RECORDS).encode(), RECORDS),
        ("json", "".join(json.dumps(record) + "\n" for record in RECORDS).encode(), RECORDS),
        ("json", [json.dumps(record).encode() for record in RECORDS], RECORDS),
        ("parquet", pa.Table.from_pylist(RECORDS), RECORDS),
    ],
    ids=["text", "lines", "lines named .json", "list", "parquet"],
)
def test_the_kind_and_the_data_say_how(kind: str, data: Any, wanted: list[Any]) -> None:
    records = parse_chunk(Chunk(source=0, index=0, line=11, data=data, end=0, end_line=0), kind)
    assert records.values == wanted
    assert records.lines[0] == 11
    assert not records.bad
