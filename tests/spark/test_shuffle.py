"""The shuffle on a real cluster of two executor processes, against the local command on the same data."""

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from click.testing import CliRunner

from jllm.commands.manifest import main as manifest_command
from jllm.data.dataset.columns import CU_SEQLENS, INPUT_IDS
from jllm.data.dataset.manifest import open_data_set
from jllm.data.dataset.reader import ShardReader
from jllm.data.shuffle.data_set import Resources, shuffle_set
from jllm.errors import UserError
from spark_jobs.shuffle import SparkShuffleConfig, run
from tests.data.foreign_sets import ids, write
from tests.data.sets import make_set, row_numbers, table_of
from tests.data.typed_sets import EVERY_TYPE, bag, exact_rows, make_typed_set

pytestmark = pytest.mark.slow
LOCAL = Resources(cores=1, memory=1 << 30)


@pytest.mark.parametrize("blocks", [3])
def test_shuffle_gives_the_local_blocks(spark: Any, tmp_path: Path, blocks: int) -> None:
    source = make_set(tmp_path / "a b", 1000, files=4)
    config = SparkShuffleConfig(data=str(source), output=str(tmp_path / "spark"), num_block=blocks, seed=9)
    manifest = run(spark, config)
    limits = Resources(cores=1, memory=1 << 30)
    shuffle_set(open_data_set(source), tmp_path / "local", blocks=blocks, seed=9, resources=limits)
    ours, theirs = open_data_set(tmp_path / "local"), open_data_set(tmp_path / "spark")
    assert theirs.manifest == manifest
    assert theirs.manifest.tokenizer == ours.manifest.tokenizer
    for path, other in zip(ours.paths, theirs.paths, strict=True):
        rows, others = (pa.Table.from_batches(list(ShardReader(one))) for one in (path, other))
        assert rows.equals(others), "block by block, row by row"
    before = {path: path.read_bytes() for path in (tmp_path / "spark").rglob("*") if path.is_file()}
    assert run(spark, config) == manifest, "found finished, as the local command finds it"
    assert {path: path.read_bytes() for path in (tmp_path / "spark").rglob("*") if path.is_file()} == before


def test_local_commands_read_what_spark_wrote(spark: Any, tmp_path: Path) -> None:
    """Also a folder that Spark wrote without us, in its legacy layouts of lists."""
    rows = [([number, 1, 2], [0, 2]) for number in range(20)]
    frame = spark.createDataFrame(rows, f"{INPUT_IDS} array<bigint>, {CU_SEQLENS} array<int>")
    for legacy in ("false", "true"):
        spark.conf.set("spark.sql.parquet.writeLegacyFormat", legacy)
        target = tmp_path / legacy / "set"
        frame.repartition(2).write.option("compression", "snappy").parquet(str(target))
        source = open_data_set(target)
        limits = Resources(cores=1, memory=1 << 30)
        shuffle_set(source, tmp_path / legacy / "out", blocks=2, seed=1, resources=limits)
        assert sorted(row_numbers(tmp_path / legacy / "out")) == list(range(20))
        assert table_of(tmp_path / legacy / "out").column(CU_SEQLENS).to_pylist() == [[0, 3]] * 20, "shifted"
    spark.conf.set("spark.sql.parquet.writeLegacyFormat", "false")


def test_spark_reads_what_we_wrote(spark: Any, tmp_path: Path) -> None:
    source = make_set(tmp_path / "a", 100, files=2)
    found = spark.read.option("recursiveFileLookup", "true").parquet(str(source)).toArrow()
    assert Counter(map(str, found.to_pylist())) == Counter(map(str, table_of(source).to_pylist()))


def test_the_trainers_reader_takes_the_output(spark: Any, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="torch is not installed: pip install .[train]")
    from jllm.train.data.rows import ShardIndex, read_rows

    source = make_set(tmp_path / "a", 60, files=2)
    run(spark, SparkShuffleConfig(data=str(source), output=str(tmp_path / "out")))
    index = ShardIndex(open_data_set(tmp_path / "out"))
    order = index.order(seed=1, epoch=0, shuffle=False)
    rows = [row.ids.tolist() for row in read_rows(index, order, 0, ahead=False)]
    assert rows == table_of(tmp_path / "out").column(INPUT_IDS).to_pylist()


def test_further_columns_travel_as_locally(spark: Any, tmp_path: Path) -> None:
    source = make_typed_set(tmp_path / "a", 500, EVERY_TYPE, files=3)
    manifest = run(spark, SparkShuffleConfig(data=str(source), output=str(tmp_path / "spark"), num_block=3, seed=9))
    shuffle_set(open_data_set(source), tmp_path / "local", blocks=3, seed=9, resources=LOCAL)
    ours, theirs = open_data_set(tmp_path / "local"), open_data_set(tmp_path / "spark")
    assert theirs.manifest == manifest
    assert theirs.manifest.further == ours.manifest.further
    for path, other in zip(ours.paths, theirs.paths, strict=True):
        rows, others = (list(ShardReader(one)) for one in (path, other))
        assert rows[0].schema == others[0].schema
        assert exact_rows(rows, one_nan=True) == exact_rows(others, one_nan=True), "the JVM knows one NaN"


def foreign(folder: Path, **columns: pa.Array) -> Path:
    write(folder / "a.parquet", {INPUT_IDS: ids([[1, 2], [3]]), "url": pa.array(["x", "y"]), **columns})
    write(folder / "b.parquet", {INPUT_IDS: ids([[4], [5, 6]]), "url": pa.array(["z", "w"])})
    result = CliRunner().invoke(manifest_command, [str(folder)])
    assert result.exit_code == 0, result.output
    return folder


def test_the_same_columns_are_left_out(spark: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = foreign(tmp_path / "set", meta=pa.array([{"a": 1}, None]), score=pa.array([1.5, None]))
    found = run(spark, SparkShuffleConfig(data=str(source), output=str(tmp_path / "spark"), seed=9))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    shuffle_set(open_data_set(source), tmp_path / "local", blocks=2, seed=9, resources=LOCAL)
    assert found.further == open_data_set(tmp_path / "local").manifest.further
    assert found.further.types == {"url": "text"}
    assert sorted(found.further.left_out) == ["meta", "score"]
    assert [line.split(": ", 2)[2] for line in lines] == found.further.warnings()
    assert bag(tmp_path / "spark") == bag(tmp_path / "local")


def test_columns_that_the_manifest_does_not_name_are_left_out(spark: Any, tmp_path: Path) -> None:
    """One of an earlier version, say, which did not look at them."""
    source = foreign(tmp_path / "set")
    manifest = tmp_path / "set/_manifest.json"
    text = manifest.read_text(encoding="utf-8").replace('"columns"', '"columns_of_old"')
    manifest.write_text(text, encoding="utf-8")
    found = run(spark, SparkShuffleConfig(data=str(source), output=str(tmp_path / "spark")))
    assert "the manifest does not name it" in found.further.left_out["url"]


def test_a_column_of_several_types_is_refused(spark: Any, tmp_path: Path) -> None:
    write(tmp_path / "set/a.parquet", {INPUT_IDS: ids([[1, 2]]), "x": pa.array(["x"])})
    write(tmp_path / "set/b.parquet", {INPUT_IDS: ids([[3, 4]]), "x": pa.array([1])})
    assert CliRunner().invoke(manifest_command, [str(tmp_path / "set")]).exit_code == 0
    with pytest.raises(UserError, match="have a column in several types"):
        run(spark, SparkShuffleConfig(data=str(tmp_path / "set"), output=str(tmp_path / "out")))
