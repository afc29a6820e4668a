"""The raw2ids job on a real cluster of two executor processes, against the local command on the same data."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from jllm.commands.raw2ids import main as raw2ids_command
from jllm.data.dataset.describe import verify
from jllm.data.dataset.manifest import PREFERENCE, open_data_set
from jllm.data.dataset.shards import INPUT_IDS, ShardReader
from jllm.data.prepare import recipes
from jllm.data.prepare.config import Raw2IdsConfig
from jllm.data.tokenizer.checked_engine import open_engine
from jllm.data.tokenizer.facts import load_tokenizer
from jllm.errors import UserError
from tests.data.pairs import Pair, pairs_of_row
from tests.data.sets import table_of
from tests.spark.lying_daemon import LIE

pytestmark = pytest.mark.slow
DOCUMENTS = 400


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


def test_control_classes(spark: Any, tokenizer: Path, tmp_path: Path) -> None:
    from spark_jobs.raw2ids import SparkRaw2IdsConfig, run

    (tmp_path / "in").mkdir()
    for name in ("one", "two"):
        write_jsonl(tmp_path / f"in/{name}.jsonl", [{"text": f"{name} {text}"} for text in documents()[:60]])
    classes = ("one*=-1", "*=random")
    given = str(tmp_path / "in")
    common = {"input": (given,), "tokenizer": str(tokenizer), "type": "pretrain", "max_len": 64}
    manifest = run(spark, SparkRaw2IdsConfig(**common, output=str(tmp_path / "spark"), control_class=classes))
    options = [word for each in classes for word in ("--control_class", each)]
    arguments = ["-i", given, "--tokenizer", str(tokenizer), "-t", "pretrain", "--max_len", "64", *options]
    expected = local(tmp_path / "local", *arguments)
    assert bags(tmp_path / "spark") == bags(expected)
    assert manifest.further.types == open_data_set(expected).manifest.further.types == {"control_class": "list<int32>"}


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


def test_an_engine_that_fails_its_proof(
    spark: Any, tokenizer: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The job starts over with the reference, as the local command does, and leaves nothing of the first attempt."""
    from spark_jobs.raw2ids import SparkRaw2IdsConfig, run

    texts = [text + LIE for text in documents()]
    given = write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in texts])
    common: dict[str, Any] = {"input": (given,), "tokenizer": str(tokenizer), "type": "pretrain", "partitions": 3}
    output = tmp_path / "spark"
    with pytest.raises(UserError, match=r"--engine fastokens: fastokens .* differs from hf on .*; use --engine auto"):
        run(spark, SparkRaw2IdsConfig(**common, output=str(output), engine="fastokens"))
    assert not output.exists()
    manifest = run(spark, SparkRaw2IdsConfig(**common, output=str(output)))
    assert "starting over with the hf engine" in capfd.readouterr().err
    arguments = ["-i", given, "--tokenizer", str(tokenizer), "-t", "pretrain", "--engine", "hf"]
    expected = local(tmp_path / "local", *arguments)
    assert bags(output) == bags(expected)
    engine = manifest.extra["engine"]
    assert engine["name"] == "hf"
    assert "differs from hf on" in engine["reason"]
    wanted = open_data_set(expected).manifest.extra["engine"]
    assert {**engine, "reason": ""} == {**wanted, "reason": "", "checks": manifest.extra.get("checks", 0)}
    assert verify(open_data_set(output)) == []
    assert manifest.extra["documents"] == DOCUMENTS, "what the first attempt found is not counted"


@pytest.mark.parametrize("lies", ["", LIE], ids=["the short cut", "the engine too"])
def test_a_short_cut_that_fails(
    spark: Any, tokenizer: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], lies: str
) -> None:
    """A template that treats texts in a way that no probe brings out."""
    from spark_jobs.raw2ids import SparkRaw2IdsConfig, run

    template = (
        "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"
        "{{- 'odd ' if message.content | length == 41 * 41 }}{{- message.content }}{{- '<|im_end|>\\n' }}{%- endfor %}"
    )
    turns = [[{"user": text[:80]}, {"assistant": text[-60:] + lies}] for text in documents()]
    turns[0] = [{"user": "x" * 41 * 41}, {"assistant": "yes" + lies}]
    given = write_jsonl(tmp_path / "chat.jsonl", turns)
    common = {"input": (given,), "tokenizer": str(tokenizer), "chat_template": template, "max_len": 4096}
    manifest = run(spark, SparkRaw2IdsConfig(**common, output=str(tmp_path / "spark")))
    said = capfd.readouterr().err
    assert "starting over without the short cut" in said
    assert ("starting over with the hf engine" in said) == bool(lies)
    assert manifest.extra["engine"]["name"] == ("hf" if lies else "fastokens")
    arguments = ["-i", given, "--tokenizer", str(tokenizer), "--chat_template", template, "--max_len", "4096"]
    expected = local(tmp_path / "local", *arguments)
    assert bags(tmp_path / "spark") == bags(expected)
    rows = table_of(tmp_path / "spark").column(INPUT_IDS).to_pylist()
    assert len(rows) == DOCUMENTS
    assert [len(row) > 41 * 41 for row in sorted(rows, key=len)[-2:]] == [False, True], "the odd text is shown"


def test_a_mistake_that_a_worker_finds_is_one_line(spark: Any, tokenizer: Path, tmp_path: Path) -> None:
    from spark_jobs.raw2ids import SparkRaw2IdsConfig, run

    given = write_jsonl(tmp_path / "chat.jsonl", [[{"user": "q"}, {"assistant": "word " * 100}]])
    common = {"input": (given,), "tokenizer": str(tokenizer), "chat_template": "chatml", "max_len": 96}
    with pytest.raises(UserError, match=r"^--overlong error: the conversation at chat.jsonl:1 has"):
        run(spark, SparkRaw2IdsConfig(**common, output=str(tmp_path / "spark"), overlong="error"))
    assert not (tmp_path / "spark").exists()


def test_pairs_as_locally(spark: Any, tokenizer: Path, tmp_path: Path) -> None:
    """Preference pairs: the same ones, each whole in a row; and shuffled they are what the local command makes."""
    from spark_jobs.raw2ids import SparkRaw2IdsConfig, run
    from spark_jobs.shuffle import SparkShuffleConfig
    from spark_jobs.shuffle import run as shuffle

    records = [{"prompt": f"{n} fox", "chosen": f"yes {'dog ' * (n % 7)}{n}", "rejected": "no"} for n in range(60)]
    records.append({"prompt": "p", "chosen": "same", "rejected": "same"})
    given = write_jsonl(tmp_path / "pairs.jsonl", records)
    common = {"input": (given,), "tokenizer": str(tokenizer), "type": "preference", "max_len": 128}
    manifest = run(spark, SparkRaw2IdsConfig(**common, chat_template="chatml", output=str(tmp_path / "spark")))
    assert manifest.kind == PREFERENCE
    assert manifest.extra["bad_records"]["identical pair"]["count"] == 1
    arguments = ["-i", given, "--tokenizer", str(tokenizer), "-t", "preference", "--max_len", "128"]
    ours = local(tmp_path / "local", *arguments, "--chat_template", "chatml")

    def pairs(folder: Path) -> list[Pair]:
        return sorted(pair for row in table_of(folder).to_pylist() for pair in pairs_of_row(row))

    assert pairs(tmp_path / "spark") == pairs(ours)
    assert len(pairs(ours)) == 60
    config = SparkShuffleConfig(data=str(ours), output=str(tmp_path / "sf"), num_block=2, seed=1)
    assert shuffle(spark, config).kind == PREFERENCE
    assert pairs(tmp_path / "sf") == pairs(ours)
