"""Sources: every format and compression gives the same records, and a bad one costs only itself."""

import bz2
import gzip
import json
import lzma
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from jllm.data.sources import chunks
from jllm.data.sources.chunks import read_chunks
from jllm.data.sources.inputs import resolve
from jllm.data.sources.parsing import parse_chunk
from jllm.data.sources.records import Records, texts_of
from jllm.errors import UserError

TEXTS = ["first\nline two", "second  ", "naïve 日本", 'fourth, with "quotes", [brackets] and {braces}, \\ too', "5"]


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


@pytest.mark.parametrize("kind", ["text", "jsonl", "json", "parquet"])
@pytest.mark.parametrize("size", [64, 100, 1 << 20])
def test_every_format_gives_the_same_texts(
    tmp_path: Path, kind: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", size)
    path = write(tmp_path, kind, TEXTS)
    assert read(path).values == TEXTS
    if kind == "parquet":
        return
    for suffix, compress in COMPRESS.items():
        packed = path.with_name(f"{path.name}.{suffix}")
        packed.write_bytes(compress(path.read_bytes()))
        assert read(packed).values == TEXTS
        assert resolve([str(packed)])[0].stem == "data"


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(codec="utf-8"), max_size=30), max_size=12),
    size=st.integers(64, 200),
    kind=st.sampled_from(["jsonl", "json", "text"]),
)
def test_blocks_do_not_show(tmp_path_factory: pytest.TempPathFactory, texts: list[str], size: int, kind: str) -> None:
    """Records and their lines are the same however the bytes are cut, and from wherever reading starts again."""
    folder = tmp_path_factory.mktemp("blocks")
    if kind == "text":
        texts = ["\n".join(part for part in text.splitlines() if part.strip()) for text in texts]
        texts = [text.strip("\r\n") for text in texts if text.strip()]
    path = write(folder, kind, texts)
    (source,) = resolve([str(path)])
    whole = read(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK_BYTES", size)
        assert read(path) == whole
        cut = list(read_chunks(source, 0))
        for i, block in enumerate(cut):
            again = read_chunks(source, 0, start=block.end, line=block.end_line, index=i + 1)
            assert list(again) == cut[i + 1 :]
    if kind != "text":
        assert whole.values == [text for text in texts if text and not text.isspace()]


def test_blank_lines_may_hold_white_space(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff \n\none\r\n  two\r\n \t\r\n\r\nthree\n\u00a0\n\n four \n\n\n".encode())
    assert read(path).values == ["one\r\n  two", "three", " four "]
    assert read(path).lines == [3, 7, 10]


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


def test_folders_globs_and_urls(tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / ".hidden").mkdir()
    for name in ("b.jsonl", "a.txt", "deep/c.jsonl.gz", "notes.pdf", ".hidden/d.txt", "_e.txt"):
        (tmp_path / "in" / name).write_bytes(b"")
    assert [source.name for source in resolve([str(tmp_path / "in")])] == ["a.txt", "b.jsonl", "deep/c.jsonl.gz"]
    assert [source.name for source in resolve([str(tmp_path / "in" / "*.jsonl")])] == ["b.jsonl"]
    url = f"file://{tmp_path}/in/*.jsonl"
    assert [source.name for source in resolve([url])] == ["b.jsonl"]
    (tmp_path / "in" / "b.jsonl").write_text('{"text": "x"}')
    (source,) = resolve([url])
    assert [parse_chunk(block, source.kind).values for block in read_chunks(source, 0)] == [[{"text": "x"}]]
    for wrong in ("nowhere", "no*where", f"file://{tmp_path}/nowhere"):
        with pytest.raises(UserError):
            resolve([str(tmp_path / wrong) if "://" not in wrong else wrong])
    with pytest.raises(UserError, match="twice"):
        resolve([str(tmp_path / "in"), str(tmp_path / "in" / "a.txt")])


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz", "zst"])
def test_damaged_files_are_one_line(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(COMPRESS[suffix](b'{"text": "x"}\n' * 5000)[:-20])
    with pytest.raises(UserError, match="cannot be read"):
        read(path)
    path.write_bytes(b"not compressed at all, but long enough to look at")
    with pytest.raises(UserError, match="cannot be read"):
        read(path)


def test_one_record_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1 << 10)
    texts = ["small", "x" * 1_000_000, "last"]
    path = write(tmp_path, "jsonl", texts)
    assert read(path).values == texts
    assert read(write(tmp_path, "text", texts)).values == texts


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


@pytest.mark.parametrize("name", ["a.jsonl", "bom.jsonl", "a.jsonl.gz", "a.json"])
def test_blocks_in_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A block of a plain local file is sent without its bytes, and read again there."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 200)
    lines = [json.dumps({"text": f"document {number} é"}) for number in range(60)]
    data = (f"[{','.join(lines)}]" if name == "a.json" else "".join(f"{line}\n" for line in lines)).encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else b"\xef\xbb\xbf" + data if "bom" in name else data)
    [source] = resolve([str(path)])
    found = list(read_chunks(source, 0))
    assert len(found) > 3
    sent = [pickle.dumps(block) for block in found]
    assert [pickle.loads(each).content for each in sent] == [block.data for block in found]
    if name.endswith(".jsonl"):
        assert all(len(each) < 400 for each in sent)
        path.write_bytes(data[:300])
        with pytest.raises(UserError, match="became shorter"):
            pickle.loads(sent[-1]).content  # noqa: B018 - reading it is the test
        path.unlink()
        with pytest.raises(UserError, match="cannot be read"):
            pickle.loads(sent[-1]).content  # noqa: B018
