"""What is written is a function of the rows alone, in row groups of a few MiB, and there completely or not at all."""

import hashlib
import itertools
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jllm.data.dataset import files, shards
from jllm.data.dataset.columns import Column, bytes_before
from jllm.data.dataset.shards import ShardWriter
from tests.data.sets import ALL_COLUMNS
from tests.data.typed_sets import COLUMNS_OF_ANY_TYPE, EVERY_TYPE, typed_rows
from tests.odd_files import files_of_at_most


def write(path: Path, batches: list[pa.RecordBatch], further: list[Column] | tuple[Column, ...]) -> ShardWriter:
    with ShardWriter(path, columns=ALL_COLUMNS, further=further) as writer:
        for batch in batches:
            writer.write(batch)
    return writer


@settings(max_examples=50, deadline=None)
@given(
    further=COLUMNS_OF_ANY_TYPE,
    cuts=st.lists(st.integers(0, 100), max_size=5),
    tokens=st.sampled_from([20, 1 << 20]),
    further_bytes=st.sampled_from([30, 1 << 20]),
)
def test_bytes_do_not_depend_on_how_rows_come(
    tmp_path_factory: pytest.TempPathFactory, further: list[Column], cuts: list[int], tokens: int, further_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("case")
    rows = typed_rows(0, 100, further)
    bounds = [0, *sorted(cuts), 100]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "ROW_GROUP_TOKENS", tokens)
        patch.setattr(shards, "ROW_GROUP_FURTHER_BYTES", further_bytes)
        whole = write(folder / "whole.parquet", [rows], further)
        some = [rows.slice(start, end - start) for start, end in itertools.pairwise(bounds)]
        write(folder / "cut.parquet", some, further)
    data = (folder / "whole.parquet").read_bytes()
    assert (folder / "cut.parquet").read_bytes() == data
    assert whole.statistics.sha256 == hashlib.sha256(data).hexdigest()
    assert (whole.statistics.rows, whole.statistics.bytes) == (100, len(data))


def test_row_groups_are_cut_by_tokens_and_by_further_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    column = Column(name="x", element="text", is_list=False)
    rows = typed_rows(0, 100, [column])
    before = bytes_before(rows.column("x"))
    monkeypatch.setattr(shards, "ROW_GROUP_FURTHER_BYTES", 200)
    write(tmp_path / "a.parquet", [rows], [column])
    metadata = pq.read_metadata(tmp_path / "a.parquet")
    start = 0
    for group in range(metadata.num_row_groups):
        end = start + metadata.row_group(group).num_rows
        assert before[end - 1] - before[start] < 200, "a row group goes on after it is full"
        assert before[end] - before[start] >= 200 or end == 100
        start = end
    assert start == 100
    monkeypatch.setattr(shards, "ROW_GROUP_FURTHER_BYTES", 1 << 20)
    monkeypatch.setattr(files, "ROW_GROUP_TOKENS", 20)
    write(tmp_path / "b.parquet", [rows], [column])
    assert pq.read_metadata(tmp_path / "b.parquet").num_row_groups > 10


def test_a_failure_leaves_no_file(tmp_path: Path) -> None:
    def fail() -> None:
        with ShardWriter(tmp_path / "a.parquet", columns=ALL_COLUMNS, further=EVERY_TYPE) as writer:
            writer.write(typed_rows(0, 10, EVERY_TYPE))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_other_columns_than_promised_are_a_defect(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="names"), ShardWriter(tmp_path / "a.parquet", columns=ALL_COLUMNS) as writer:
        writer.write(typed_rows(0, 10, EVERY_TYPE))


@pytest.mark.parametrize("size", [0, 4, 1000, 20_000, 100_000])
def test_a_shard_that_a_disk_does_not_take_is_named(tmp_path: Path, size: int) -> None:
    """Wherever it is met: in a row group, and at the end, where what waits to be written is tried again."""
    path = tmp_path / "a.parquet"
    batches = [typed_rows(start, 2000, EVERY_TYPE) for start in range(0, 8000, 2000)]
    with pytest.raises(OSError, match="too large") as caught, files_of_at_most(size):
        write(path, batches, EVERY_TYPE)
    assert caught.value.filename == str(path)
    assert list(tmp_path.iterdir()) == []
