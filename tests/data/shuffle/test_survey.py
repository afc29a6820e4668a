"""What the footers say of a data set is what its rows are."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jllm.data.dataset.columns import Column
from jllm.data.dataset.manifest import open_data_set
from jllm.data.dataset.reader import ShardReader
from jllm.data.shuffle import passes
from jllm.data.shuffle.data_set import Resources, shuffle_set
from jllm.data.shuffle.survey import survey
from tests.data.foreign_sets import ids, spark_like, write
from tests.data.sets import make_set
from tests.data.typed_sets import EVERY_TYPE, make_typed_set


@pytest.mark.parametrize("further", [(), EVERY_TYPE], ids=["ids alone", "every type"])
def test_packed_size_is_what_the_rows_take(tmp_path: Path, further: tuple[Column, ...]) -> None:
    """Against the bytes that packing makes of the rows: at most a tenth more, and never less."""
    data_set = open_data_set(make_typed_set(tmp_path / "a", 3000, further, files=3))
    found = survey(data_set, cores=2)
    from jllm.data.dataset.columns import schema
    from jllm.data.shuffle.compact import Compact

    compact = Compact(columns=found.packed, schema=schema(found.columns, found.further.carried))
    taken = sum(compact.pack(batch).nbytes for path in data_set.paths for batch in ShardReader(path))
    assert taken <= found.packed_size
    # Three offsets of 4 bytes a column, of which a row on its way has one or two, and its position.
    assert found.packed_size <= taken + 3000 * 8 * len(found.packed) + 0.1 * taken


def test_places_and_ranges(tmp_path: Path) -> None:
    data_set = open_data_set(make_set(tmp_path / "a", 10, files=3))
    found = survey(data_set, cores=1)
    assert [(shard.first_row, shard.rows) for shard in found.shards] == [(0, 3), (3, 3), (6, 4)]
    ranges = {each.column.name: each.range for each in found.packed}
    assert ranges == {"input_ids": (0, 9), "labels": (-100, 9), "cu_seqlens": (0, 7)}


def test_files_of_different_columns(tmp_path: Path) -> None:
    found = survey(open_data_set(spark_like(tmp_path / "a")), cores=2)
    assert found.columns == ("input_ids", "labels", "cu_seqlens")
    assert found.further.types == {}
    assert [*found.further.left_out] == ["source"]
    ranges = {each.column.name: each.range for each in found.packed}
    assert ranges["labels"] is None, "what stands for absent labels is in no footer"


def test_no_files(tmp_path: Path) -> None:
    found = survey(open_data_set(make_set(tmp_path / "a", 0, files=0)), cores=1)
    assert (found.shards, found.columns, found.packed_size) == ((), ("input_ids",), 0)


def test_text_in_a_dictionary_keeps_to_the_cap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 100 KB that the file has in a few bytes: they go through the disk, in buckets of the size they take."""
    text = pa.array([f"{number % 3}" * 100_000 for number in range(200)])
    write(tmp_path / "a/a.parquet", {"input_ids": ids([[number] for number in range(200)]), "x": text})
    assert (tmp_path / "a/a.parquet").stat().st_size < 100_000
    data_set = open_data_set(tmp_path / "a")
    assert survey(data_set, cores=1).packed_size > 20_000_000
    held: list[int] = []
    ordered = passes.Bucket.ordered

    def weighed(bucket: passes.Bucket) -> passes.OrderedRows:
        rows = ordered(bucket)
        held.append(rows.rows.nbytes)
        return rows

    monkeypatch.setattr(passes.Bucket, "ordered", weighed)
    monkeypatch.setattr(passes, "MIN_BUCKET", 1 << 20)
    shuffle_set(data_set, tmp_path / "out", blocks=1, seed=1, resources=Resources(cores=1, memory=6 << 20))
    assert len(held) > 5
    assert max(held) < 2 * np.mean(held) < 6 << 20
    assert sum(entry.rows for entry in open_data_set(tmp_path / "out").manifest.files) == 200
    assert pq.read_table(open_data_set(tmp_path / "out").paths[0]).column("x").nbytes > 20_000_000
