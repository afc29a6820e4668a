"""The bytes of a source: damaged files are told, never taken for shorter ones."""

from pathlib import Path

import pytest

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
