"""The bytes of a source: damaged files are told, never taken for shorter ones."""

import io
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jllm.data.sources.inputs import resolve
from jllm.data.sources.streams import open_source, read_exactly, skip
from jllm.errors import UserError
from tests.data.source_files import COMPRESS, read


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz", "zst"])
def test_damaged_files_are_one_line(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(COMPRESS[suffix](b'{"text": "x"}\n' * 5000)[:-20])
    with pytest.raises(UserError, match="cannot be read"):
        read(path)
    path.write_bytes(b"not compressed at all, but long enough to look at")
    with pytest.raises(UserError, match="cannot be read"):
        read(path)


EXAMPLES = 30 * int(os.environ.get("JLLM_TEST_SIZE", "1"))


class Dripping(io.RawIOBase):
    """Gives no more than three bytes at once, as pipes may."""

    def __init__(self, data: bytes) -> None:
        self._inner = io.BytesIO(data)

    def read(self, size: int = -1) -> bytes:
        return self._inner.read(min(size, 3))


@settings(max_examples=EXAMPLES, deadline=None)
@given(data=st.binary(max_size=40), start=st.integers(0, 40), size=st.integers(0, 50))
def test_exactly_so_many_bytes_from_there(data: bytes, start: int, size: int) -> None:
    stream: Any = Dripping(data)
    if start > len(data):
        with pytest.raises(EOFError, match="shorter"):
            skip(stream, start, seekable=False)
        return
    skip(stream, start, seekable=False)
    assert read_exactly(stream, size) == data[start : start + size]
    seekable = io.BytesIO(data)
    skip(seekable, start, seekable=True)
    assert read_exactly(seekable, size) == data[start : start + size]


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz", "zst"])
@settings(max_examples=EXAMPLES, deadline=None)
@given(data=st.binary(min_size=1, max_size=3000), size=st.integers(1, 700))
def test_compressed_bytes_come_out(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, data: bytes, size: int
) -> None:
    path = tmp_path_factory.mktemp("compressed") / f"a.txt.{suffix}"
    path.write_bytes(COMPRESS[suffix](data))
    with open_source(resolve([str(path)])[0]) as stream:
        found = b""
        while more := read_exactly(stream, size):
            found += more
    assert found == data
