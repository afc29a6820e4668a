"""JSON lists: the elements, however they are cut, and lists that do not end well."""

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jllm.data.sources import json_list
from jllm.data.sources.chunk import Chunk
from jllm.data.sources.chunks import read_chunks
from jllm.data.sources.inputs import resolve
from jllm.data.sources.parsing import parse_chunk


@pytest.mark.parametrize(
    ("text", "bad"),
    [
        ('[{"text": "a"}, {"text": "b"}]\n \n', 0),
        ('[{"text": "a"}, {"text": "b"}] and more', 1),
        ('[{"text": "a"}]\n[\n{"text": "b"}\n]', 0),
        ('[\n{"text": "a"}] or [{"text": "b"}]', 1),
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
    st.integers(-(2**63), 2**64 - 1) | st.text(st.sampled_from('ab"\\[]{},: é\n'), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('a"]', max_size=2), inner, max_size=2),
    max_leaves=6,
)


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    values=st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=9), min_size=1), min_size=2), data=st.data()
)
def test_a_list_that_does_not_close_is_a_file_cut_short(values: list[Any], data: st.DataObject) -> None:
    """Wherever it was cut, and also when a run goes on at the end of what an earlier one took."""
    text = json.dumps(values).encode()
    stream = io.BytesIO(text[: data.draw(st.integers(1, len(text) - 1))])
    found = json_list.chunks(stream, b"", 0, 0, 1, 0, 5)
    taken = _until_it_is_refused(found)
    if taken:
        end = taken[-1]
        stream.seek(end.end)
        again = json_list.chunks(stream, b"", 0, end.end, end.end_line, end.index + 1, 5, goes_on=True)
        assert not _until_it_is_refused(again)


def _until_it_is_refused(chunks: Iterator[Chunk]) -> list[Chunk]:
    taken: list[Chunk] = []
    with pytest.raises(EOFError, match="cut short"):
        taken.extend(chunks)
    return taken


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    values=st.lists(
        st.dictionaries(st.text('a"]}', max_size=2), elements, min_size=1, max_size=3), min_size=1, max_size=9
    ),
    indents=st.lists(st.sampled_from([0, 1, 4]), min_size=9, max_size=9),
    size=st.integers(1, 60),
)
def test_objects_over_many_lines_are_read(values: list[Any], indents: list[int], size: int) -> None:
    data = "\n".join(json.dumps(value, indent=n) for value, n in zip(values, indents, strict=False)).encode() + b"\n"
    assert json_list.layout(data) == "objects"
    found = list(json_list.chunks(io.BytesIO(data), b"", 3, 0, 1, 0, size, form="objects"))
    records = [json_list.parse(chunk.data, chunk.line) for chunk in found]
    assert [value for record in records for value in record.values] == values
    for number, chunk in enumerate(found):
        rest = io.BytesIO(data[chunk.end :])
        again = json_list.chunks(rest, b"", 3, chunk.end, chunk.end_line, number + 1, size, form="objects")
        assert list(again) == found[number + 1 :]


@pytest.mark.parametrize(
    ("head", "layout"),
    [
        ('{"a": 1}\n{"a": 2}\n', "lines"),
        ('{"a": 1}', "lines"),
        ('[{"user": "q"}, {"assistant": "a"}]\n[{"user": "q"}]\n', "lines"),
        ('[{"a": 1}]\n', "list"),
        ('[\n{"a": 1}\n]', "list"),
        ('\n\n{\n"a": 1\n}', "objects"),
        ('{"a": {"b":\n1}}', "objects"),
        ('{"a": "cut off in a text\n{"a": 1}\n', "lines"),
        ('{"a": {\n{"a": 1}\n', "lines"),
        ('"text"\n"more"\n', "lines"),
        ("", "lines"),
    ],
)
def test_how_a_file_is_laid_out(head: str, layout: str) -> None:
    assert json_list.layout(head.encode()) == layout


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
