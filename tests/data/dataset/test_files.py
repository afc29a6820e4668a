"""Which files below a folder are shards."""

from pathlib import Path

import pytest

from jllm.data.dataset.files import file_name, list_shards
from jllm.errors import UserError


def test_names() -> None:
    assert file_name("wiki-00000", 12, "zstd") == "wiki-00000-00012.zstd.parquet"


def test_only_parquet_files_that_are_nobodys_bookkeeping(tmp_path: Path) -> None:
    for name in ("b/1.parquet", "a.parquet", "b/0.snappy.parquet", "_x.parquet", ".y.parquet", "_meta/z.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "notes.txt").touch()
    found = [path.relative_to(tmp_path).as_posix() for path in list_shards(tmp_path)]
    assert found == ["a.parquet", "b/0.snappy.parquet", "b/1.parquet"]


@pytest.mark.parametrize("name", ["_temporary", "b/_temporary", "_delta_log"])
def test_folders_that_cannot_be_trusted(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir(parents=True)
    with pytest.raises(UserError, match=r"_temporary|Delta"):
        list_shards(tmp_path)
