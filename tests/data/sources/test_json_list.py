"""JSON lists: the elements, however they are cut, and lists that do not end well."""

from pathlib import Path

import pytest

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
