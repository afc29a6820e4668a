"""Both Spark jobs on a real cluster of two executor processes, against the local commands on the same data."""

import json
import os
import random
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from jllm.commands.raw2ids import main as raw2ids_command
from jllm.data.dataset.manifest import open_data_set, verify
from jllm.data.dataset.shards import CU_SEQLENS, INPUT_IDS, ShardReader
from jllm.data.prepare import recipes
from jllm.data.prepare.config import Raw2IdsConfig
from jllm.data.shuffle.data_set import Resources, shuffle_set
from jllm.data.tokenizer.checked_engine import open_engine
from jllm.data.tokenizer.facts import load_tokenizer
from jllm.errors import UserError
from tests.data.sets import row_numbers, table_of
from tests.data.tokenizers_for_tests import make_byte_tokenizer

pyspark = pytest.importorskip("pyspark", reason="pyspark is not installed: pip install .[spark]")
pytest.importorskip("pandas", reason="pandas is not installed: pip install .[spark]")
if shutil.which("java") is None and "JAVA_HOME" not in os.environ:
    pytest.skip("no Java: install a JDK of version 17 or newer", allow_module_level=True)
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
DOCUMENTS = 400


@pytest.fixture(scope="module")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """`local-cluster[2,1,1024]`: two executors, each a process of its own."""
    import sys

    from pyspark.sql import SparkSession

    home = os.path.dirname(pyspark.__file__)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARK_HOME", home)
        patch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
        patch.setenv("PYSPARK_PYTHON", sys.executable)
        patch.setenv("PYSPARK_DRIVER_PYTHON", sys.executable)
        session = (
            SparkSession.builder.master("local-cluster[2,1,1024]")
            .config("spark.driver.host", "127.0.0.1")
            .config("spark.driver.bindAddress", "127.0.0.1")
            .config("spark.ui.enabled", "false")
            .config("spark.executorEnv.PYTHONPATH", str(ROOT))
            .config("spark.local.dir", str(tmp_path_factory.mktemp("spark")))
            .config("spark.sql.warehouse.dir", str(tmp_path_factory.mktemp("warehouse")))
            .config("spark.log.level", "ERROR")
            .getOrCreate()
        )
        work = Path(home, "work", session.sparkContext.applicationId)
        yield session
        session.stop()
        shutil.rmtree(work, ignore_errors=True)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_byte_tokenizer(tmp_path_factory.mktemp("tokenizer") / "bytes")


def documents() -> list[str]:
    rng = random.Random(1)
    words = ["fox", "naïve", "日本語", "def f(x):", "1234", "lazy\n\ndog", "<|im_end|>"]
    return [f"{number}: " + " ".join(rng.choices(words, k=rng.randint(1, 60))) for number in range(DOCUMENTS)]


def bags(folder: Path) -> Counter[tuple[tuple[int, ...], ...]]:
    """The rows of a data set as a multiset, all columns."""
    rows = table_of(folder).to_pylist()
    return Counter(tuple(tuple(row[name]) for name in sorted(row)) for row in rows)


def local(folder: Path, *arguments: str) -> Path:
    result = CliRunner().invoke(raw2ids_command, ["-o", str(folder), "--cores", "1", "--quiet", *arguments])
    assert result.exit_code == 0, result.output
    return folder


def write_jsonl(path: Path, records: list[Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def test_unpacked_documents_and_bad_lines(spark: Any, tokenizer: Path, tmp_path: Path) -> None:
    from spark_jobs.raw2ids import SparkRaw2IdsConfig, run

    given = write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in documents()])
    with open(given, "a", encoding="utf-8") as file:
        file.write('{"text": "cut of\n{"other": 1}\n')
    common = {"input": (given,), "tokenizer": str(tokenizer), "type": "pretrain", "max_len": 64}
    manifest = run(spark, SparkRaw2IdsConfig(**common, output=str(tmp_path / "spark"), partitions=3))
    arguments = ["-i", given, "--tokenizer", str(tokenizer), "-t", "pretrain", "--max_len", "64", "--on_error", "skip"]
    expected = local(tmp_path / "local", *arguments)
    assert bags(tmp_path / "spark") == bags(expected)
    opened, wanted = open_data_set(tmp_path / "spark").manifest, open_data_set(expected).manifest
    assert opened == manifest
    for name in ("rows", "tokens", "trained_tokens", "longest_row", "tokenizer", "documents"):
        assert opened.to_json()[name] == wanted.to_json()[name], name
    bad, bad_wanted = opened.extra["bad_records"], wanted.extra["bad_records"]
    assert {kind: found["count"] for kind, found in bad.items()} == {
        kind: found["count"] for kind, found in bad_wanted.items()
    }
    assert verify(open_data_set(tmp_path / "spark")) == []


def test_packed_rows_of_each_partition(spark: Any, tokenizer: Path, tmp_path: Path) -> None:
    """Records that Spark reads from Parquet, packed; each partition equals the local functions on its records."""
    from spark_jobs.raw2ids import SparkRaw2IdsConfig, run

    texts = documents()
    (tmp_path / "in").mkdir()
    for number in range(2):
        part = texts[number::2]
        pq.write_table(pa.table({"body": part, "n": list(range(len(part)))}), tmp_path / f"in/{number}.parquet")
    config = SparkRaw2IdsConfig(
        input=(str(tmp_path / "in"),),
        output=str(tmp_path / "out"),
        tokenizer=str(tokenizer),
        type="pretrain",
        max_len=50,
        stack=True,
        text_field="body",
        read_format="parquet",
    )
    run(spark, config)
    facts = load_tokenizer(str(tokenizer))
    plain = Raw2IdsConfig(
        input=("-",), tokenizer=str(tokenizer), type="pretrain", max_len=50, stack=True, text_field="body"
    )
    encoder = recipes.pretrain_encoder(plain, facts, open_engine(facts))
    frame = spark.read.parquet(str(tmp_path / "in")).select("body")
    partitions = frame.rdd.glom().map(lambda rows: [row.body for row in rows]).collect()
    expected = Counter[str]()
    for part in filter(None, partitions):
        batch = pa.RecordBatch.from_pydict({"body": part})
        rows = recipes.rows_of_texts([batch], encoder, recipes.packer_of(plain, facts), "body")
        expected.update(str(row) for one in rows for row in one.to_pylist())
    found = Counter(str(row) for row in table_of(tmp_path / "out").to_pylist())
    assert found == expected
    assert sum(found.values()) > 20


def test_chat(spark: Any, tokenizer: Path, tmp_path: Path) -> None:
    from spark_jobs.raw2ids import SparkRaw2IdsConfig, run

    turns = [[{"user": text[:80]}, {"assistant": text[-60:]}] for text in documents()]
    given = write_jsonl(tmp_path / "chat.jsonl", turns)
    common = {"input": (given,), "tokenizer": str(tokenizer), "chat_template": "chatml", "max_len": 96}
    run(spark, SparkRaw2IdsConfig(**common, output=str(tmp_path / "spark"), partitions=2))
    arguments = ["-i", given, "--tokenizer", str(tokenizer), "--chat_template", "chatml", "--max_len", "96"]
    expected = local(tmp_path / "local", *arguments)
    assert bags(tmp_path / "spark") == bags(expected)
    assert set(ShardReader(open_data_set(tmp_path / "spark").paths[0]).columns) >= {INPUT_IDS, "labels"}


def test_text_files(spark: Any, tokenizer: Path, tmp_path: Path) -> None:
    from spark_jobs.raw2ids import SparkRaw2IdsConfig, run

    text = "one\nstill one\n\n \ntwo\r\n\nthree\n"
    (tmp_path / "in.txt").write_bytes(text.encode())
    common = {"input": (str(tmp_path / "in.txt"),), "tokenizer": str(tokenizer), "type": "pretrain"}
    run(spark, SparkRaw2IdsConfig(**common, output=str(tmp_path / "spark"), read_format="text"))
    arguments = ["-i", str(tmp_path / "in.txt"), "--tokenizer", str(tokenizer), "-t", "pretrain"]
    assert bags(tmp_path / "spark") == bags(local(tmp_path / "local", *arguments))


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
