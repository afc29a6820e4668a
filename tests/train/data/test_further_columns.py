"""Further columns cost the trainer nothing: it reads the same rows, and not a byte of them."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jllm.data.dataset import files
from jllm.data.dataset.columns import COLUMNS
from jllm.data.dataset.manifest import open_data_set
from jllm.train.data.rows import Row, ShardIndex, read_rows
from tests.data.typed_sets import EVERY_TYPE, make_typed_set


def plain(row: Row) -> tuple[list[int], ...]:
    assert row.labels is not None
    assert row.boundaries is not None
    return row.ids.tolist(), row.labels.tolist(), row.boundaries.tolist()


@pytest.mark.parametrize("in_pieces", [False, True])
def test_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_pieces: bool) -> None:
    found = []
    for name, further in (("plain", ()), ("typed", EVERY_TYPE)):
        folder = make_typed_set(tmp_path / name, 300, further, files=3)
        with monkeypatch.context() as patch:
            if in_pieces:
                patch.setattr(files, "ROW_GROUP_TOKENS", 50)
            index = ShardIndex(open_data_set(folder))
            order = index.order(seed=1, epoch=0, shuffle=False)
            windows = [index.read_window(order, window) for window in range(order.num_windows)]
            assert {name for window in windows for batch in window for name in batch.schema.names} == {*COLUMNS}
            found.append([plain(row) for row in read_rows(index, order, 0, ahead=False)])
    assert found[0] == found[1]
    assert len(found[0]) == 300


def test_no_memory_for_them(tmp_path: Path) -> None:
    """What Arrow holds while rows are read, beside a column that is a hundred times larger than they are."""
    rows = {name: pa.array([[number, 1, 2, 3]] * 2000, pa.list_(pa.int32())) for number, name in enumerate(COLUMNS[:2])}
    text = pa.array([f"{number}" * 3000 for number in range(2000)])
    most = []
    for name, table in (("plain", pa.table(rows)), ("typed", pa.table({**rows, "text": text}))):
        (tmp_path / name).mkdir()
        pq.write_table(table, tmp_path / name / "a.parquet", row_group_size=500)
        index = ShardIndex(open_data_set(tmp_path / name))
        order = index.order(seed=1, epoch=0, shuffle=True)
        before = pa.total_allocated_bytes()
        most.append(max(pa.total_allocated_bytes() - before for _ in read_rows(index, order, 0, ahead=True)))
    assert text.nbytes > 20_000_000
    assert most[1] <= most[0] + 100_000
