"""Footers that stand for something are taken, others are refused before pyarrow would end the process."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jllm.data.dataset.footer import check_footer
from jllm.data.dataset.reader import ShardReader
from jllm.errors import UserError
from tests.fixtures import random_rows, write_rows


@pytest.mark.parametrize("compression", ["NONE", "SNAPPY", "GZIP", "ZSTD", "LZ4", "BROTLI"])
def test_footers_of_pyarrow_are_taken(tmp_path: Path, compression: str) -> None:
    table = pa.table({"a": [1, 2], "b": ["x", None], "c": [[1.5], []], "d": [{"e": True}, {"e": False}]})
    pq.write_table(table, tmp_path / "a.parquet", compression=compression, row_group_size=1)
    with pa.OSFile(str(tmp_path / "a.parquet")) as file:
        check_footer(file)


def test_a_codec_that_is_none_is_refused(tmp_path: Path) -> None:
    folder = write_rows(tmp_path / "set", random_rows(3, labels=True))
    [path] = folder.rglob("*.parquet")
    ShardReader(path).read_group(0)
    data = path.read_bytes()
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    refused = set()
    for at in range(footer, len(data) - 8):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :])
        try:
            ShardReader(path).read_group(0)
        except UserError as error:
            refused.add(str(error))
    assert any("has the codec" in line for line in refused)
    assert len(refused) > 10
