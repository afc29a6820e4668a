"""Row groups are read with the columns asked for, by whichever way, and no more than that is held in memory."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jllm.data.dataset import files, reader
from jllm.data.dataset.columns import Column, schema
from jllm.data.dataset.reader import ShardReader
from jllm.data.dataset.shards import ShardWriter
from jllm.errors import UserError
from tests.data.sets import ALL_COLUMNS
from tests.data.typed_sets import COLUMNS_OF_ANY_TYPE, EVERY_TYPE, exact_rows, typed_rows


def write(path: Path, rows: pa.RecordBatch, further: list[Column] | tuple[Column, ...]) -> Path:
    with ShardWriter(path, columns=ALL_COLUMNS, further=further) as writer:
        writer.write(rows)
    return path


@settings(max_examples=60, deadline=None)
@given(further=COLUMNS_OF_ANY_TYPE, count=st.integers(1, 30), foreign=st.booleans(), data=st.data())
def test_any_columns_of_our_file_and_of_the_same_by_pyarrow(
    tmp_path_factory: pytest.TempPathFactory, further: list[Column], count: int, foreign: bool, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("case") / "a.parquet"
    rows = typed_rows(0, count, further)
    if foreign:
        pq.write_table(pa.table(rows), path, row_group_size=7)
    else:
        write(path, rows, further)
    shard = ShardReader(path)
    assert shard.columns == ALL_COLUMNS
    assert shard.further.carried == tuple(sorted(further))
    assert shard.stored_schema.names == rows.schema.names
    assert exact_rows(shard) == exact_rows([rows])
    names = data.draw(st.lists(st.sampled_from([*rows.schema.names, "absent"]), unique=True, min_size=1))
    wanted = [name for name in rows.schema.names if name in names]
    found = [shard.read_group(group, names) for group in range(shard.metadata.num_row_groups)]
    assert all(batch.schema.names == wanted for batch in found)
    chosen = ShardReader(path, columns=names)
    if wanted:
        assert exact_rows(found) == exact_rows(chosen) == exact_rows([rows.select(wanted)])


def test_lists_of_numbers_of_our_files_are_read_by_our_codec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", typed_rows(0, 30, EVERY_TYPE), EVERY_TYPE)
    read = []
    plain = reader.read_list
    monkeypatch.setattr(
        reader, "read_list", lambda file, chunk: (read.append(chunk.path_in_schema), plain(file, chunk))[1]
    )
    ShardReader(path).read_group(0)
    lists = [*ALL_COLUMNS, "float32 list", "int32 list"]
    assert read == [f"{name}.list.element" for name in lists]


def test_large_row_groups_come_in_batches_with_all_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = typed_rows(0, 200, EVERY_TYPE)
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    monkeypatch.setattr(files, "ROW_GROUP_TOKENS", 50)
    shard = ShardReader(tmp_path / "a.parquet")
    batches = list(shard.batches(0))
    assert len(batches) > 5
    assert {batch.num_rows for batch in batches[:-1]} == {shard.rows_at_once(0)}
    assert all(batch.schema == schema(ALL_COLUMNS, EVERY_TYPE) for batch in batches)
    assert exact_rows(batches) == exact_rows([rows])
    only = ShardReader(tmp_path / "a.parquet", columns=["text"])
    assert exact_rows(only) == exact_rows([rows.select(["text"])])


@pytest.mark.parametrize("dictionary", [False, True])
@pytest.mark.parametrize("kind", ["text", "list<text>"])
def test_the_size_of_text_is_never_less_than_it_takes(tmp_path: Path, dictionary: bool, kind: str) -> None:
    """Also where a dictionary holds it in much less."""
    column = Column.named("x", kind)
    values = ["x" * 1000] * 500 if not column.is_list else [["x" * 500, "y" * 500], []] * 250
    rows = {"input_ids": pa.array([[1]] * 500), "x": pa.array(values, column.type)}
    pq.write_table(pa.table(rows), tmp_path / "a.parquet", use_dictionary=dictionary, row_group_size=100)
    taken = 500_000 if not column.is_list else 250_000
    size = ShardReader(tmp_path / "a.parquet").text_size("x")
    assert taken <= size < 1.1 * taken


def test_elements_and_ranges_of_the_footer(tmp_path: Path) -> None:
    rows = typed_rows(0, 30, EVERY_TYPE)
    shard = ShardReader(write(tmp_path / "a.parquet", rows, EVERY_TYPE))
    lists = rows.column("int32 list").to_pylist()
    numbers = [number for one in lists for number in one]
    assert shard.elements("int32 list") == (sum(max(1, len(one)) for one in lists), (min(numbers), max(numbers)))
    assert shard.elements("float32 list")[1] is None
    assert shard.elements("absent") == (0, (0, 0))


def test_a_damaged_further_column_names_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", typed_rows(0, 300, EVERY_TYPE), EVERY_TYPE)
    shard = ShardReader(path)
    group = shard.metadata.row_group(0)
    for index, name in enumerate(shard.stored_schema.names):
        data = bytearray(path.read_bytes())
        chunk = group.column(index)
        data[chunk.data_page_offset + chunk.total_compressed_size - 1] ^= 0x10
        damaged = tmp_path / f"{name}.parquet"
        damaged.write_bytes(data)
        with pytest.raises(UserError, match=r"\.parquet: row group 0 is damaged"):
            list(ShardReader(damaged))
