"""Chunks that are planned are those that are read."""

import dataclasses
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jllm.data.sources import chunks, plain_files
from jllm.data.sources.chunk import Chunk
from jllm.data.sources.chunks import opened, read_chunks
from jllm.data.sources.inputs import resolve
from jllm.data.sources.records import RefusedRecordError
from jllm.errors import UserError

EXAMPLES = 150 * int(os.environ.get("JLLM_TEST_SIZE", "1"))
LINES = st.lists(st.sampled_from([b"", b"x", b"yy", b"  ", b"\t", b"z" * 40, b"w" * 150, "é".encode()]), max_size=40)


@pytest.mark.parametrize("kind", ["jsonl", "txt"])
@settings(max_examples=EXAMPLES, deadline=None)
@given(lines=LINES, size=st.integers(8, 80), tail=st.integers(1, 40), most=st.integers(100, 500), ends=st.booleans())
def test_planned_chunks_are_those_that_are_read(
    tmp_path_factory: pytest.TempPathFactory, kind: str, lines: list[bytes], size: int, tail: int, most: int, ends: bool
) -> None:
    path = tmp_path_factory.mktemp("plain") / f"a.{kind}"
    path.write_bytes(b"\n".join(lines) + b"\n" * ends)
    (source,) = resolve([str(path)])

    def found(planned: bool) -> tuple[list[Chunk], str | None]:
        result = []
        line = 1
        try:
            for chunk in read_chunks(source, 0, most=most, planned=planned):
                if planned:
                    assert isinstance(chunk.data, int)
                    chunk = _opened(chunk, source.kind, most, line, str(path))
                line = chunk.end_line
                # A large one is read again where it is parsed.
                result.append(dataclasses.replace(chunk, data=chunk.content, file=None))
        except UserError as error:
            return result, str(error)
        return result, None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK_BYTES", size)
        patch.setattr(plain_files, "_TAIL", tail)
        if not path.stat().st_size:
            assert found(False) == ([], None)
            return
        assert found(True) == found(False)


def _opened(chunk: Chunk, kind: str, most: int, line: int, path: str) -> Chunk:
    """A planned chunk that begins at this line."""
    try:
        chunk = opened(chunk, kind, most)
    except RefusedRecordError as error:
        raise error.behind(line).of(path) from None
    return dataclasses.replace(chunk, line=line, end_line=chunk.end_line + line - 1)


def test_a_file_that_became_shorter_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"1\n" * 100)
    (source,) = resolve([str(path)])
    (chunk,) = read_chunks(source, 0, planned=True)
    path.write_bytes(b"1\n")
    with pytest.raises(UserError, match="became shorter"):
        opened(chunk, "jsonl", 1 << 20)
