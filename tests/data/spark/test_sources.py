"""Which files an input names for Spark, and how they are read."""

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jllm.data.prepare.config import Raw2IdsConfig
from jllm.data.sources.inputs import resolve
from jllm.data.spark.files import HadoopFiles
from jllm.data.spark.sources import FILE, LINES, ROWS, WHOLE, groups_of, paths_of, reading_of, resolved
from jllm.errors import UserError
from tests.spark.file_systems import mounted

pytestmark = pytest.mark.slow
NAMES = ("a.jsonl", "deep/b.jsonl", "c %41.txt", "d.jsonl.gz", "e.json", "[f]{g}*.jsonl", "h,i.jsonl", "é日.jsonl")


def make(folder: Path) -> None:
    for name in (*NAMES, "_x.jsonl", ".y.jsonl", "z.pdf", "set/_manifest.json", "set/s.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"text": name}) + "\n")


def test_the_files_that_the_local_command_finds(spark: Any, tmp_path: Path) -> None:
    make(tmp_path)
    files = HadoopFiles(spark)
    expected = [each.name for each in resolve([str(tmp_path)], passed_over=["_manifest.json"])]
    assert sorted(expected) == sorted(NAMES)
    for given in (str(tmp_path), f"file://{tmp_path}", f"file:{tmp_path}", mounted(spark, tmp_path)):
        found = resolved(files, [given], None)
        assert sorted(each.name for each in found) == sorted(NAMES), given
        assert {each.kind for each in found} == {"jsonl", "json", "text"}
    sources = resolved(files, [str(tmp_path)], None)
    assert {each.name: reading_of(each) for each in sources}["d.jsonl.gz"] == WHOLE
    with pytest.raises(UserError, match="is named twice"):
        resolved(files, [str(tmp_path), str(tmp_path / "a.jsonl")], None)


def test_every_file_is_read_whatever_it_is_called(spark: Any, tmp_path: Path) -> None:
    make(tmp_path)
    files = HadoopFiles(spark)
    sources = [each for each in resolved(files, [str(tmp_path)], None) if reading_of(each) == LINES]
    (group,) = groups_of(spark, files, sources, partitions=None, shown="-i x")
    seen = {row[FILE] for row in group.frame.select(FILE).collect()}
    assert len(seen) == len(sources) == 5
    assert set(paths_of(files, sources).values()) == set(range(5))


def test_what_spark_cannot_read_is_refused(spark: Any, tmp_path: Path) -> None:
    files = HadoopFiles(spark)
    for name in ("_a.jsonl", ".a.jsonl"):
        (tmp_path / name).write_text("{}\n")
        with pytest.raises(UserError, match="passes over names"):
            resolved(files, [str(tmp_path / name)], None)
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(UserError, match="no regular file"):
        resolved(files, [str(tmp_path / "pipe.jsonl")], None)
    with (tmp_path / "large.txt").open("wb") as file:
        file.truncate(1 << 31)
    with pytest.raises(UserError, match="cannot be cut anywhere"):
        resolved(files, [str(tmp_path / "large.txt")], None)
    for given, said in (
        ("-", "standard input"),
        ("nosuch://x/y", "cannot be listed"),
        (str(tmp_path / "m"), "no such"),
    ):
        with pytest.raises(UserError, match=said):
            resolved(files, [given], None)


def test_columns(spark: Any, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"], "n": [1], "input_ids": [[1]]}), tmp_path / "a.parquet")
    files = HadoopFiles(spark)
    sources = resolved(files, [str(tmp_path)], None)
    (group,) = groups_of(spark, files, sources, partitions=None, shown="-i x")
    assert group.reading == ROWS

    def config(**more: Any) -> Raw2IdsConfig:
        return Raw2IdsConfig(input=("x",), tokenizer="t", **more)

    taken = group.with_needed_columns(config(type="pretrain"), sources[0])
    assert [name for name in taken.frame.columns if not name.startswith("_jllm")] == ["text"]
    for refused in (config(type="pretrain", text_field="body"), config()):
        with pytest.raises(UserError, match="has input_ids; rows of ids are a data set already"):
            group.with_needed_columns(refused, sources[0])
