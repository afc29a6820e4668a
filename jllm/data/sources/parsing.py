"""The records of a chunk, whatever its format."""

from jllm.data.sources import json_lines, json_list, parquet, text
from jllm.data.sources.chunk import Chunk
from jllm.data.sources.records import Records


def parse_chunk(chunk: Chunk, kind: str, *, long_field: str | None = None) -> Records:
    """The records of a chunk: texts for a text source, JSON values for the others.

    Runs on any thread; nothing but the chunk is looked at.

    Args:
        long_field: long strings of JSON may be `long_texts.LongText`, as for `json_values`.
    """
    content, line = chunk.content, chunk.line
    if kind == "text":
        return text.parse(content, line)
    if kind == "parquet":
        return parquet.parse(content, line)
    if isinstance(content, list):
        return json_list.parse(content, line, long_field=long_field)
    return json_lines.parse(content, line, long_field=long_field)
