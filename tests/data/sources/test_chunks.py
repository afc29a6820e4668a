"""Sources in chunks: every format and compression gives the same records, however it is cut."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jllm.data.sources import chunks
from jllm.data.sources.chunks import read_chunks
from jllm.data.sources.inputs import resolve
from tests.data.source_files import COMPRESS, read, write


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


def test_one_record_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1 << 10)
    texts = ["small", "x" * 1_000_000, "last"]
    path = write(tmp_path, "jsonl", texts)
    assert read(path).values == texts
    assert read(write(tmp_path, "text", texts)).values == texts


TEXTS = ["first\nline two", "second  ", "naïve 日本", 'fourth, with "quotes", [brackets] and {braces}, \\ too', "5"]
