"""Several sets as one, weights, and row groups that are too large to be held at once."""

import collections
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jllm.data.dataset import files, shards
from jllm.data.dataset.manifest import DataSet, open_data_set
from jllm.train.data import rows as rows_module
from jllm.train.data.rows import ShardIndex, read_rows, row_lengths
from tests.fixtures import write_rows


def numbered(folder: Path, numbers: range, **more: Any) -> DataSet:
    """A set whose row n is n tokens n (and one more, so that it has a length)."""
    return open_data_set(write_rows(folder, [{"input_ids": [n] * (1 + n % 7)} for n in numbers], **more))


def read(index: ShardIndex, *, epoch: int = 0, shuffle: bool = True, start: int = 0) -> list[int]:
    order = index.order(seed=1, epoch=epoch, shuffle=shuffle)
    return [int(row.ids[0]) for row in read_rows(index, order, start, ahead=True)]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "ROW_GROUP_TOKENS", 64)
    monkeypatch.setattr(rows_module, "WINDOW_BYTES", 1000)


def test_sets_together_are_one(tmp_path: Path) -> None:
    one, other = numbered(tmp_path / "one", range(100)), numbered(tmp_path / "other", range(100, 150), files=2)
    index = ShardIndex(one, other)
    assert read(index, shuffle=False) == list(range(150))
    assert sorted(read(index)) == list(range(150))
    assert read(index) != read(index, epoch=1)
    # Rows of both sets stand side by side.
    assert min(read(index)[:100]) < 100 < max(read(index)[:100])


def test_weights(tmp_path: Path) -> None:
    """2.5: every row twice, and a half of them, another one in each epoch, a third time."""
    one, other = numbered(tmp_path / "one", range(100)), numbered(tmp_path / "other", range(100, 181), files=3)
    index = ShardIndex(one, other, weights=[0.25, 2.5])
    assert index.num_rows == 25 + 202
    thirds = []
    for epoch in range(2):
        counts = collections.Counter(read(index, epoch=epoch))
        assert sum(counts[n] for n in range(100)) == 25
        assert {counts[n] for n in range(100)} == {0, 1}
        assert {counts[n] for n in range(100, 181)} == {2, 3}
        thirds.append({n for n in counts if counts[n] == 3})
        assert len(thirds[-1]) == 40
    assert thirds[0] != thirds[1]
    assert read(index, start=90) == read(index)[90:]


def test_weights_belong_to_the_fingerprint(tmp_path: Path) -> None:
    one, other = numbered(tmp_path / "one", range(10)), numbered(tmp_path / "other", range(20))
    found = [
        ShardIndex(one).fingerprint,
        ShardIndex(one, weights=[2]).fingerprint,
        ShardIndex(one, other).fingerprint,
        ShardIndex(other, one).fingerprint,
        ShardIndex(one, other, weights=[1, 2]).fingerprint,
    ]
    assert found[0] == one.manifest.fingerprint
    assert len(set(found)) == len(found)


@pytest.fixture
def foreign(tmp_path: Path) -> DataSet:
    """Three files of another writer: a row group of 400 rows, one of 3, and two of 200."""
    for name, count, size in (("a", 400, 400), ("b", 3, 3), ("c", 400, 200)):
        start = {"a": 0, "b": 400, "c": 403}[name]
        lists = [[n] * (1 + n % 7) for n in range(start, start + count)]
        table = pa.table({"input_ids": pa.array(lists, pa.list_(pa.int64()))})
        (tmp_path / "foreign").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / f"foreign/{name}.parquet", row_group_size=size)
    return open_data_set(tmp_path / "foreign")


def test_large_row_groups_are_read_in_pieces(foreign: DataSet) -> None:
    index = ShardIndex(foreign)
    assert max(index.rows) < 40
    assert read(index, shuffle=False) == list(range(803))
    shuffled = read(index)
    assert sorted(shuffled) == list(range(803))
    for start in (1, 399, 500, 802):
        assert read(index, start=start) == shuffled[start:]


def test_a_piece_is_read_once(foreign: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Going on in an open row group, not from its start for every piece."""
    opened = []
    plain = shards.ShardReader.batches

    def counted(self: shards.ShardReader, group: int) -> Any:
        opened.append((self.path, group))
        return plain(self, group)

    monkeypatch.setattr(shards.ShardReader, "batches", counted)
    read(ShardIndex(foreign))
    assert len(opened) == len(set(opened)) == 3


def test_rows_are_located(foreign: DataSet) -> None:
    index = ShardIndex(foreign, weights=[1.5])
    order = index.order(seed=1, epoch=0, shuffle=True)
    numbers = [int(row.ids[0]) for row in read_rows(index, order, 0, ahead=False)]
    for place in range(0, len(numbers), 37):
        n = numbers[place]
        file, group, row = ("a", 0, n) if n < 400 else ("b", 0, n - 400) if n < 403 else ("c", *divmod(n - 403, 200))
        assert index.locate(order, place).endswith(f"{file}.parquet: row group {group}, row {row}")


def test_lengths_are_in_order(foreign: DataSet) -> None:
    index = ShardIndex(foreign, weights=[0.7])
    order = index.order(seed=3, epoch=2, shuffle=True)
    expected = [len(row.ids) for row in read_rows(index, order, 0, ahead=False)]
    assert row_lengths(index, order).tolist() == expected


def test_memory_of_a_large_row_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrow's memory stays near a window although the file is one row group of 64 MB."""
    monkeypatch.setattr(files, "ROW_GROUP_TOKENS", 1 << 18)
    monkeypatch.setattr(rows_module, "WINDOW_BYTES", 4 << 20)
    ids = np.random.default_rng(0).integers(0, 1000, 1 << 24).astype(np.int32)
    lists = pa.ListArray.from_arrays(np.arange(0, len(ids) + 1, 1 << 10, dtype=np.int32), ids)
    (tmp_path / "set").mkdir()
    pq.write_table(pa.table({"input_ids": lists}), tmp_path / "set/a.parquet", row_group_size=1 << 20)
    del ids, lists
    index = ShardIndex(open_data_set(tmp_path / "set"))
    order = index.order(seed=1, epoch=0, shuffle=True)
    base, peak, count = pa.total_allocated_bytes(), 0, 0
    for _ in read_rows(index, order, 0, ahead=True):
        count += 1
        peak = max(peak, pa.total_allocated_bytes() - base)
    assert count == 1 << 14
    assert peak < 24 << 20
