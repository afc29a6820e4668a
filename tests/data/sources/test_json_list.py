"""JSON lists: the elements, however they are cut, and lists that do not end well."""

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jllm.data.sources import json_list
from jllm.data.sources.chunks import read_chunks
from jllm.data.sources.inputs import resolve
from jllm.data.sources.parsing import parse_chunk


@pytest.mark.parametrize(
    ("text", "bad"),
    [
        ('[{"text": "a"}, {"text": "b"}]\n \n', 0),
        ('[{"text": "a"}, {"text": "b"}', 1),
        ('[{"text": "a"}, {"text": "b"},', 1),
        ('[{"text": "a"}, {"text": "b"}, {"te', 1),
        ('[{"text": "a"}, {"text": "b"}] and more', 1),
    ],
)
def test_a_list_that_does_not_end_well_is_told(tmp_path: Path, text: str, bad: int) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    (source,) = resolve((str(path),), kind=None)
    blocks = list(read_chunks(source, 0))
    records = [parse_chunk(block, source.kind) for block in blocks]
    assert [value["text"] for record in records for value in record.values] == ["a", "b"]
    assert sum(len(record.bad) for record in records) == bad
    end = blocks[-1]
    assert not list(read_chunks(source, 0, start=end.end, line=end.end_line, index=1))  # nothing is left to go on with


EXAMPLES = 60 * int(os.environ.get("JLLM_TEST_SIZE", "1"))
elements = st.recursive(
    st.integers() | st.text(st.sampled_from('ab"\\[]{},: é\n'), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('a"]', max_size=2), inner, max_size=2),
    max_leaves=6,
)


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    values=st.lists(elements, max_size=15),
    size=st.integers(1, 60),
    held=st.integers(0, 64),
    indent=st.sampled_from([None, 0, 2]),
)
def test_the_elements_are_those_of_the_list(values: list[Any], size: int, held: int, indent: int | None) -> None:
    """However much was read before, and wherever reading starts again."""
    data = json.dumps(values, indent=indent).encode()
    stream = io.BytesIO(data)
    begun = stream.read(held)
    found = list(json_list.chunks(stream, begun, 3, 0, 1, 0, size))
    records = [json_list.parse(chunk.data, chunk.line) for chunk in found]
    assert [value for record in records for value in record.values] == values
    assert [line for record in records for line in record.lines] == list(range(1, len(values) + 1))
    assert not any(record.bad for record in records)
    assert [chunk.index for chunk in found] == list(range(len(found)))
    for number, chunk in enumerate(found):
        rest = io.BytesIO(data[chunk.end :])
        again = json_list.chunks(rest, b"", 3, chunk.end, chunk.end_line, number + 1, size)
        assert list(again) == found[number + 1 :]
