"""Files of every format for tests, and the records that are read of them."""

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from jllm.data.sources.chunks import read_chunks
from jllm.data.sources.inputs import resolve
from jllm.data.sources.parsing import parse_chunk
from jllm.data.sources.records import Records, texts_of


def read(path: Path, field: str = "text", kind: str | None = None) -> Records:
    """All records of a file as one."""
    (source,) = resolve([str(path)], kind=kind)
    values: list[Any] = []
    lines: list[int] = []
    bad: list[Any] = []
    for block in read_chunks(source, 0):
        found = texts_of(parse_chunk(block, source.kind), source.kind, field)
        values += found.values
        lines += found.lines
        bad += found.bad
    return Records(values=values, lines=lines, bad=bad)


def write(folder: Path, kind: str, texts: list[str]) -> Path:
    rows = [{"text": text, "other": [1]} for text in texts]
    path = folder / f"data.{ {'text': 'txt'}.get(kind, kind) }"
    if kind == "text":
        path.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    else:
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    return path


COMPRESS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda data: zstandard.ZstdCompressor().compress(data[:40]) + zstandard.ZstdCompressor().compress(data[40:]),
}
