"""Our Parquet layout: other readers read it, we read it back, and nothing that is damaged passes."""

import io
from pathlib import Path

import duckdb
import numpy as np
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jllm.data.dataset import list_codec
from jllm.data.dataset.columns import ordered, schema, to_list_array
from jllm.data.dataset.file_writer import ColumnFileWriter
from jllm.data.dataset.list_codec import DamagedError, read_list
from jllm.data.dataset.shards import CODECS, ShardReader
from jllm.errors import UserError

COLUMNS = ("input_ids", "labels")
Rows = list[list[int]]
ANY_ROWS = st.lists(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=40), min_size=1, max_size=40)


def batch_of(rows: Rows) -> pa.RecordBatch:
    """Two columns: the rows, and the rows backwards."""
    columns = []
    for values in (rows, rows[::-1]):
        offsets = np.cumsum([0, *map(len, values)])
        columns.append(to_list_array(np.array([item for row in values for item in row], np.int32), offsets))
    return pa.RecordBatch.from_arrays(columns, schema=schema(COLUMNS))


def written(groups: list[Rows], codec: str = "zstd") -> bytes:
    file = io.BytesIO()
    writer = ColumnFileWriter(
        file, ordered(COLUMNS), codec=codec, metadata={"jllm.format": "1"}, writer="jllm version 0"
    )
    for rows in groups:
        writer.write(batch_of(rows))
    writer.close()
    return file.getvalue()


def read_back(data: bytes) -> list[pa.RecordBatch]:
    footer = pq.read_metadata(io.BytesIO(data))
    groups = [footer.row_group(index) for index in range(footer.num_row_groups)]
    file = pa.BufferReader(data)
    return [
        pa.RecordBatch.from_arrays([read_list(file, group.column(i)) for i in range(2)], schema=schema(COLUMNS))
        for group in groups
    ]


@pytest.mark.parametrize("page", [4, 64, 1 << 20], ids=["a row a page", "small pages", "usual pages"])
@settings(deadline=None, max_examples=60)
@given(groups=st.lists(ANY_ROWS, min_size=1, max_size=3))
def test_pyarrow_and_we_read_what_was_written(page: int, groups: list[Rows]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(list_codec, "PAGE_BYTES", page)
        data = written(groups)
    wanted = [batch_of(rows) for rows in groups]
    table = pq.read_table(io.BytesIO(data), page_checksum_verification=True)
    assert table.schema.equals(schema(COLUMNS))
    assert table.to_pylist() == [row for batch in wanted for row in batch.to_pylist()]
    assert read_back(data) == wanted


@given(rows=ANY_ROWS)
@settings(deadline=None, max_examples=30)
def test_a_row_larger_than_a_page_may_be(rows: Rows) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(list_codec, "PAGE_BYTES", 16)
        patch.setattr(list_codec, "LARGEST_PAGE_BYTES", 32)
        data = written([rows])
    assert pq.read_table(io.BytesIO(data)).to_pylist() == batch_of(rows).to_pylist()
    assert read_back(data) == [batch_of(rows)]


@pytest.mark.parametrize("codec", CODECS)
def test_codecs_and_other_readers(codec: str, tmp_path: Path) -> None:
    rows = [[*range(i)] for i in range(300)]
    path = tmp_path / "a.parquet"
    path.write_bytes(written([rows, rows], codec))
    wanted = [row["input_ids"] for row in batch_of(rows).to_pylist()] * 2
    assert read_back(path.read_bytes()) == [batch_of(rows)] * 2
    assert pq.ParquetFile(path).metadata.row_group(0).column(0).compression == codec.upper()
    assert polars.read_parquet(path)["input_ids"].to_list() == wanted
    assert [row for (row,) in duckdb.sql(f"select input_ids from '{path}'").fetchall()] == wanted


def test_footer() -> None:
    footer = pq.read_metadata(io.BytesIO(written([[[5, -7], [], [3]]])))
    column = footer.row_group(0).column(0)
    assert (footer.num_rows, column.num_values) == (3, 4)  # an empty list is an entry
    assert (column.statistics.min, column.statistics.max, column.statistics.null_count) == (-7, 5, 0)
    assert footer.metadata[b"jllm.format"] == b"1"
    assert pq.read_metadata(io.BytesIO(written([]))).num_rows == 0


@settings(deadline=None, max_examples=200)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_is_found(place: float, bit: int) -> None:
    rows = [[*range(i)] for i in range(50)]
    data = bytearray(written([rows]))
    footer = pq.read_metadata(io.BytesIO(bytes(data)))
    columns = [footer.row_group(0).column(i) for i in range(2)]
    begin, end = 4, columns[1].data_page_offset + columns[1].total_compressed_size
    data[begin + int(place * (end - begin))] ^= 1 << bit
    file = pa.BufferReader(bytes(data))
    with pytest.raises(DamagedError):
        _ = [read_list(file, column) for column in columns]


def test_a_damaged_shard_names_its_file_and_row_group(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    data = bytearray(written([[[1, 2, 3]], [[4, 5, 6]]]))
    offset = pq.read_metadata(io.BytesIO(bytes(data))).row_group(1).column(0).data_page_offset
    data[offset + 30] ^= 0xFF
    path.write_bytes(data)
    reader = ShardReader(path)
    assert reader.read_group(0, ["input_ids"]).to_pylist() == [{"input_ids": [1, 2, 3]}]
    with pytest.raises(UserError, match=r"a\.parquet: row group 1 is damaged"):
        reader.read_group(1)
