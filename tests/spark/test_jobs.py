"""Both Spark jobs on a real cluster of two executor processes, against the local commands on the same data."""

import os
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jllm.data.dataset.manifest import open_data_set
from jllm.data.dataset.shards import CU_SEQLENS, INPUT_IDS, ShardReader
from jllm.data.shuffle.data_set import Resources, shuffle_set
from jllm.errors import UserError
from tests.data.sets import row_numbers, table_of

pyspark = pytest.importorskip("pyspark", reason="pyspark is not installed: pip install .[spark]")
pytest.importorskip("pandas", reason="pandas is not installed: pip install .[spark]")
if shutil.which("java") is None and "JAVA_HOME" not in os.environ:
    pytest.skip("no Java: install a JDK of version 17 or newer", allow_module_level=True)
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("blocks", [3])
def test_shuffle_gives_the_local_blocks(spark: Any, tmp_path: Path, blocks: int) -> None:
    from spark_jobs.shuffle import SparkShuffleConfig, run
    from tests.data.sets import make_set

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
    with pytest.raises(UserError, match="exists"):
        run(spark, config)


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
    from tests.data.sets import make_set

    source = make_set(tmp_path / "a", 100, files=2)
    found = spark.read.option("recursiveFileLookup", "true").parquet(str(source)).toArrow()
    assert Counter(map(str, found.to_pylist())) == Counter(map(str, table_of(source).to_pylist()))


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    """Found before Spark starts."""
    import sys

    for script, arguments, said in (
        ("raw2ids.py", ["-i", "x", "-o", "y", "--tokenizer", "z", "-n", "5"], "--num"),
        ("raw2ids.py", ["-i", "x", "--tokenizer", "z"], "-o"),
        ("shuffle.py", ["-d", "x", "-o", "y", "-n", "0"], "--num_block 0"),
    ):
        done = subprocess.run(
            [sys.executable, str(ROOT / "spark_jobs" / script), *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=False,
        )
        assert done.returncode == 2
        assert said in done.stderr
        assert done.stderr.count("\n") == 1


def test_the_trainers_reader_takes_the_output(spark: Any, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="torch is not installed: pip install .[train]")
    from jllm.train.data.rows import ShardIndex, read_rows
    from spark_jobs.shuffle import SparkShuffleConfig, run
    from tests.data.sets import make_set

    source = make_set(tmp_path / "a", 60, files=2)
    run(spark, SparkShuffleConfig(data=str(source), output=str(tmp_path / "out")))
    index = ShardIndex(open_data_set(tmp_path / "out"))
    order = index.order(seed=1, epoch=0, shuffle=False)
    rows = [row.ids.tolist() for row in read_rows(index, order, 0, ahead=False)]
    assert rows == table_of(tmp_path / "out").column(INPUT_IDS).to_pylist()
