"""Records: bad ones cost themselves, texts are found in fields."""

from pathlib import Path

import pytest

from jllm.data.sources.inputs import resolve
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
