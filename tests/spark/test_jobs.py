"""raw2ids on a real cluster of two executor processes, against the local command on the same data; and mistakes."""

import json
import os
import random
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from jllm.commands.raw2ids import main as raw2ids_command
from jllm.data.dataset.manifest import open_data_set, verify
from jllm.data.dataset.shards import INPUT_IDS, ShardReader
from jllm.data.prepare import recipes
from jllm.data.prepare.config import Raw2IdsConfig
from jllm.data.tokenizer.engine import open_engine
from jllm.data.tokenizer.facts import load_tokenizer
from tests.data.sets import table_of
from tests.data.tokenizers_for_tests import make_byte_tokenizer

pytest.importorskip("pyspark", reason="pyspark is not installed: pip install .[spark]")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
DOCUMENTS = 400


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
