"""Records: bad ones cost themselves, texts are found in fields."""

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jllm.data.sources.inputs import resolve
from jllm.data.sources.records import BadRecord, Records, field_of, texts_of
from jllm.errors import UserError
from tests.data.source_files import read


def test_bad_records_never_touch_their_neighbours(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [
        b'{"text": "one"}', b"{oops", b'{"text": "\xff\xfe"}', b'{"no": 1}', b'{"text": 5}', b'{"text": " "}',
        b"", b"7", b'{"text": "\\ud800"}', b'{"text": "nine", "x": NaN}', b'{"text": "ten"}',
    ]  # fmt: skip
    path.write_bytes(b"\n".join(lines))
    records = read(path)
    assert records.values == ["one", "nine", "ten"]
    assert records.lines == [1, 10, 11]
    assert [(bad.line, bad.kind) for bad in records.bad] == [
        (2, "bad JSON"), (3, "not UTF-8"), (4, "missing field"), (5, "wrong type"), (6, "empty document"),
        (8, "missing field"), (9, "not UTF-8"),
    ]  # fmt: skip
    text = tmp_path / "b.txt"
    text.write_bytes(b"good\n\nb\xffd\n\ngood too\n")
    assert read(text).values == ["good", "good too"]
    assert [(bad.line, bad.kind) for bad in read(text).bad] == [(3, "not UTF-8")]
    listed = tmp_path / "c.json"
    listed.write_text('[{"text": "a"}, {"text": oops}, {"text": "b"}]')
    assert read(listed).values == ["a", "b"]
    assert [bad.kind for bad in read(listed).bad] == ["bad JSON"]


def test_fields_and_lines_under_other_names(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": {"b": "x"}}\n{"a.b": "y"}\n')
    assert read(path, "a.b").values == ["x", "y"]
    plain = tmp_path / "noname"
    plain.write_text("x\n\ny")
    assert read(plain, kind="text").values == ["x", "y"]
    with pytest.raises(UserError, match="input_format"):
        resolve([str(plain)])


EXAMPLES = 60 * int(os.environ.get("JLLM_TEST_SIZE", "1"))
keys = st.text("ab.", min_size=1, max_size=3)
objects = st.recursive(
    st.none() | st.text(max_size=3) | st.integers(),
    lambda inner: st.dictionaries(keys, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=EXAMPLES, deadline=None)
@given(value=objects, path=st.lists(st.text("ab", min_size=1, max_size=2), min_size=1, max_size=3))
def test_a_field_is_found_where_the_path_leads(value: Any, path: list[str]) -> None:
    def followed() -> Any:
        found = value
        for key in path:
            if not isinstance(found, dict) or key not in found:
                return None
            found = found[key]
        return found

    whole = ".".join(path)
    flat = isinstance(value, dict) and len(path) > 1 and whole in value
    assert field_of(value, path) == (value[whole] if flat else followed())


@settings(max_examples=EXAMPLES, deadline=None)
@given(values=st.lists(objects | st.dictionaries(st.just("text"), objects), max_size=8))
def test_each_record_is_a_text_or_bad(values: list[Any]) -> None:
    lines = [3 * number for number in range(len(values))]
    before = [BadRecord(kind="bad JSON", line=1, detail="")]
    found = texts_of(Records(values=values, lines=lines, bad=before), "jsonl", "text")
    assert sorted([*found.lines, *(bad.line for bad in found.bad)]) == sorted([*lines, 1])
    assert [bad.line for bad in found.bad] == sorted(bad.line for bad in found.bad)
    for line, text in zip(found.lines, found.values, strict=True):
        assert values[line // 3]["text"] == text
        assert text.strip()


def test_null_is_called_null() -> None:
    values = [{"text": None}, {"other": 1}, {"a": {"text": None}}, {"a": None}]
    records = Records(values=values, lines=[1, 2, 3, 4], bad=[])
    assert [bad.detail for bad in texts_of(records, "jsonl", "text").bad[:2]] == [
        '"text" is null', 'no "text" (there is: other)',
    ]  # fmt: skip
    assert [bad.detail.startswith('"a.text" is null') for bad in texts_of(records, "jsonl", "a.text").bad] == [
        False, False, True, False,
    ]  # fmt: skip
