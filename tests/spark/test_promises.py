"""What the local commands promise, of the Spark jobs: what `-C` removes, where output may lie, places of bad records,
options, lost executors, other file systems."""

import dataclasses
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from jllm.commands.raw2ids import main as local_command
from jllm.data.dataset.describe import verify
from jllm.data.dataset.manifest import MANIFEST_NAME, open_data_set
from jllm.data.prepare.config import Raw2IdsConfig
from tests.data.sets import make_set
from tests.spark.file_systems import mounted
from tests.spark.lines import End, contents, found, run_line

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.fixture
def raw2ids(spark: Any, tokenizer: Path) -> Callable[..., End]:
    """The job on a command line, `-t pretrain`."""
    from spark_jobs.raw2ids import main

    return lambda *words: run_line(main, ["--tokenizer", str(tokenizer), "-t", "pretrain", *map(str, words)])


@pytest.fixture
def shuffle(spark: Any) -> Callable[..., End]:
    from spark_jobs.shuffle import main

    return lambda *words: run_line(main, list(map(str, words)))


def write_texts(path: Path, count: int, bad: tuple[int, ...] = ()) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{{bad {i}" if i in bad else json.dumps({"text": f"text {i} " * 3}) for i in range(count)]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_clean_removes_what_the_job_made_alone(raw2ids: Callable[..., End], tmp_path: Path) -> None:
    """The input and files of others in the output folder stay, whatever they are called."""
    given = write_texts(tmp_path / "out" / "raw.jsonl", 20)
    (tmp_path / "out" / "notes").mkdir()
    (tmp_path / "out" / "notes" / "part-00007.zstd.parquet.txt").write_text("mine")
    before = contents(tmp_path)
    assert raw2ids("-i", given, "-o", tmp_path / "out").code == 0
    done = contents(tmp_path)
    (tmp_path / "out" / "part-00009.zstd.parquet").write_bytes(b"of somebody else")
    end = raw2ids("-i", given, "-o", tmp_path / "out", "-C")
    assert "holds Parquet files that this command did not write" in end.mistake
    left = contents(tmp_path)
    assert left.pop("out/part-00009.zstd.parquet")
    assert left == before, "its own are gone"
    (tmp_path / "out" / "part-00009.zstd.parquet").unlink()
    assert raw2ids("-i", given, "-o", tmp_path / "out", "-C").code == 0
    assert contents(tmp_path) == done
    assert raw2ids("-i", given, "-o", tmp_path / "out").out.count("finished earlier") == 1
    assert contents(tmp_path) == done
    other = raw2ids("-i", given, "-o", tmp_path / "out", "--max_len", 99)
    assert "was made with max_len = 2048, now it is 99; start over with -C" in other.mistake
    write_texts(given, 21)
    assert "the input changed (raw.jsonl)" in raw2ids("-i", given, "-o", tmp_path / "out").mistake
    assert verify(open_data_set(tmp_path / "out")) == []


def test_clean_of_a_shuffle(shuffle: Callable[..., End], tmp_path: Path) -> None:
    make_set(tmp_path / "set", 20, 2)
    assert shuffle("-d", tmp_path / "set", "-o", tmp_path / "out").code == 0
    (tmp_path / "out" / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    assert (
        "give --clean to make it anew" in shuffle("-d", tmp_path / "set", "-o", tmp_path / "out", "--seed", 9).mistake
    )
    assert contents(tmp_path) == before
    assert shuffle("-d", tmp_path / "set", "-o", tmp_path / "out", "--seed", 9, "-C").code == 0
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert open_data_set(tmp_path / "out").manifest.options["seed"] == 9
    assert verify(open_data_set(tmp_path / "out")) == []


def test_results_of_other_commands_are_left(
    raw2ids: Callable[..., End], shuffle: Callable[..., End], tokenizer: Path, tmp_path: Path
) -> None:
    given = write_texts(tmp_path / "raw.jsonl", 20)
    words = ["--tokenizer", str(tokenizer), "-t", "pretrain", "-i", str(given), "-o", str(tmp_path / "out")]
    assert run_line(local_command, words).code == 0
    make_set(tmp_path / "set", 9)
    before = contents(tmp_path)
    for more in ([], ["-C"]):
        assert "raw2ids" in raw2ids("-i", given, "-o", tmp_path / "out", *more).mistake or not more
        assert contents(tmp_path) == before
        assert shuffle("-d", tmp_path / "set", "-o", tmp_path / "out", *more).code == 2
        assert contents(tmp_path) == before


@pytest.mark.parametrize("where", ["in", "in/out", "in/deep/out", "link", "link/out", "in/../in/out"])
def test_an_output_where_the_input_is(
    raw2ids: Callable[..., End], shuffle: Callable[..., End], tmp_path: Path, where: str
) -> None:
    write_texts(tmp_path / "in" / "a.jsonl", 20)
    (tmp_path / "link").symlink_to("in")
    before = contents(tmp_path)
    for more in ([], ["-C"]):
        end = raw2ids("-i", tmp_path / "in", "-o", f"{tmp_path}/{where}", *more)
        assert "lies in the input folder" in end.mistake
        assert contents(tmp_path) == before
    (tmp_path / "in" / "a.jsonl").unlink()
    make_set(tmp_path / "in", 20, 2)
    before = contents(tmp_path)
    for more in ([], ["-C"]):
        end = shuffle("-d", tmp_path / "in", "-o", f"{tmp_path}/{where}", *more)
        assert "lies in the input folder" in end.mistake
        assert contents(tmp_path) == before


def test_an_output_around_the_input(raw2ids: Callable[..., End], shuffle: Callable[..., End], tmp_path: Path) -> None:
    make_set(tmp_path / "around" / "set", 20, 2)
    before = contents(tmp_path)
    for more in ([], ["-C"]):
        end = shuffle("-d", tmp_path / "around" / "set", "-o", tmp_path / "around", *more)
        assert "is not empty and not made by this command" in end.mistake
        end = raw2ids("-i", tmp_path / "around" / "set", "-o", tmp_path / "around", "--read_format", "parquet", *more)
        assert end.code == 2
        assert contents(tmp_path) == before


def test_two_jobs_at_once(raw2ids: Callable[..., End], spark: Any, tmp_path: Path) -> None:
    from jllm.data.spark.files import HadoopFiles
    from jllm.data.spark.place import JobPlace

    given = write_texts(tmp_path / "raw.jsonl", 20)
    place = JobPlace(HadoopFiles(spark), str(tmp_path / "out"), work=".raw2ids", command="x")
    with place.held():
        before = set(contents(tmp_path))
        for more in ([], ["-C"]):
            assert "another run is writing there" in raw2ids("-i", given, "-o", tmp_path / "out", *more).mistake
        assert set(contents(tmp_path)) == before
    assert set(contents(tmp_path)) == {"raw.jsonl"}
    assert raw2ids("-i", given, "-o", tmp_path / "out").code == 0


@pytest.mark.parametrize("more", [(), ("--partitions", "3")], ids=["as read", "dealt"])
def test_bad_records_in_parts_of_files(
    raw2ids: Callable[..., End], spark: Any, tokenizer: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    """Files that Spark cuts into several parts: kinds, counts, file and line are the local command's."""
    for name, count, bad in (("a", 900, (3, 450, 451)), ("b", 700, (0, 699)), ("c", 5, (4,)), ("d", 800, (799,))):
        write_texts(tmp_path / "in" / f"{name}.jsonl", count, bad)
    words = ["-i", str(tmp_path / "in"), "-o"]
    spark.conf.set("spark.sql.files.maxPartitionBytes", "8k")
    try:
        assert raw2ids(*words, tmp_path / "spark", *more).code == 0
        stopped = raw2ids(*words, tmp_path / "stop", "--on_error", "stop", *more)
    finally:
        spark.conf.unset("spark.sql.files.maxPartitionBytes")
    local = ["--tokenizer", str(tokenizer), "-t", "pretrain", "--cores", "1", *words]
    assert run_line(local_command, [*local, str(tmp_path / "local")]).code == 0
    assert found(tmp_path / "spark") == found(tmp_path / "local")
    assert len(open_data_set(tmp_path / "spark").paths) > 2
    expected = run_line(local_command, [*local, str(tmp_path / "stop"), "--on_error", "stop"])
    assert stopped.mistake == expected.mistake
    assert "a.jsonl:4: " in stopped.mistake


def test_what_is_lost_with_an_executor_counts_once(
    raw2ids: Callable[..., End], spark: Any, tokenizer: Path, tmp_path: Path
) -> None:
    given = write_texts(tmp_path / "raw.jsonl", 12_000, bad=tuple(range(0, 12_000, 200)))
    killed: list[int] = []

    def kill_one() -> None:
        until = time.monotonic() + 60
        while not any((tmp_path / "out").glob(".raw2ids/data-*/_temporary/0/*")) and time.monotonic() < until:
            time.sleep(0.01)
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            if any(word.endswith("CoarseGrainedExecutorBackend") for word in words) and app in words:
                os.kill(int(path.parent.name), signal.SIGKILL)
                killed.append(int(path.parent.name))
                return

    app = spark.sparkContext.applicationId
    killer = threading.Thread(target=kill_one)
    killer.start()
    end = raw2ids("-i", given, "-o", tmp_path / "out", "--partitions", "6")
    killer.join()
    assert killed
    assert end.code == 0, end.err
    local = ["--tokenizer", str(tokenizer), "-t", "pretrain", "-i", str(given), "-o", str(tmp_path / "local")]
    assert run_line(local_command, local).code == 0
    assert found(tmp_path / "out") == found(tmp_path / "local")
    assert verify(open_data_set(tmp_path / "out")) == []


@pytest.mark.parametrize(("given", "codec"), [("gzip", "GZIP"), ("snappy", "SNAPPY"), ("lz4", "LZ4")])
def test_compression(raw2ids: Callable[..., End], tmp_path: Path, given: str, codec: str) -> None:
    assert raw2ids("-i", write_texts(tmp_path / "a.jsonl", 50), "-o", tmp_path / "out", "-c", given).code == 0
    manifest = open_data_set(tmp_path / "out").manifest
    (path,) = open_data_set(tmp_path / "out").paths
    assert path.name.endswith(f".{given}.parquet")
    assert manifest.options["compress"] == given
    assert pq.ParquetFile(path).metadata.row_group(0).column(0).compression == codec
    assert verify(open_data_set(tmp_path / "out")) == []


def test_the_page_names_the_options_that_are_refused(raw2ids: Callable[..., End], tmp_path: Path) -> None:
    """Those and no others; all else that the local command has is taken."""
    from spark_jobs.raw2ids import LOCAL_ONLY

    text = (ROOT / "docs" / "spark.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^\* Refused by name, .*?: (.*?)\.$", text, re.M | re.S)
    assert set(re.findall(r"`--(\w+)`", line)) == set(LOCAL_ONLY)
    for field in dataclasses.fields(Raw2IdsConfig):
        if field.name in LOCAL_ONLY:
            value = [] if isinstance(field.default, bool) else ["3" if field.name != "eval_fraction" else "0.3"]
            end = raw2ids("-i", "x", "-o", tmp_path / "out", f"--{field.name}", *value)
            assert f"--{field.name}: " in end.mistake or "--eval_" in end.mistake
    assert "--compress brotli: Spark does not write it" in raw2ids("-i", "x", "-o", "y", "-c", "brotli").mistake


def test_another_file_system(
    raw2ids: Callable[..., End], shuffle: Callable[..., End], spark: Any, tokenizer: Path, tmp_path: Path
) -> None:
    """Input and output by a mount table of Hadoop's, where no path is one of this machine."""
    for name, suffix in (("a", ".jsonl"), ("deep/b c", ".jsonl"), ("_passed", ".jsonl"), ("note", ".pdf")):
        write_texts(tmp_path / "in" / f"{name}{suffix}", 60, bad=(7,) if name == "a" else ())
    (tmp_path / "in" / "t.txt").write_text("one\n\ntwo\n")
    top = mounted(spark, tmp_path)
    assert raw2ids("-i", f"{top}/in", "-o", f"{top}/spark").code == 0
    local = ["--tokenizer", str(tokenizer), "-t", "pretrain", "-i", str(tmp_path / "in"), "-o"]
    assert run_line(local_command, [*local, str(tmp_path / "local")]).code == 0
    assert found(tmp_path / "spark") == found(tmp_path / "local")
    assert verify(open_data_set(tmp_path / "spark")) == []
    before = contents(tmp_path)
    assert "lies in the input folder" in raw2ids("-i", f"{top}/in", "-o", f"{top}/in/out", "-C").mistake
    assert "nothing there" in raw2ids("-i", f"{top}/missing*", "-o", f"{top}/x").mistake
    assert "lies in the input folder" in shuffle("-d", f"{top}/spark", "-o", f"{top}/spark", "-C").mistake
    assert contents(tmp_path) == before
    assert shuffle("-d", f"{top}/spark", "-o", f"{top}/sf", "-n", 3).code == 0
    assert "already shuffled" in shuffle("-d", f"{top}/spark", "-o", f"{top}/sf", "-n", 3).out
    assert len(open_data_set(tmp_path / "sf").paths) == 3
    assert raw2ids("-i", f"{top}/in/a*.jsonl", "-o", f"{top}/spark", "-C").code == 0
    assert open_data_set(tmp_path / "spark").manifest.extra["documents"] == 59


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-40] + b"x" * 40), "does not match its checksum|changed"),
        (lambda path: path.unlink(), "listed in the manifest and not there"),
        (lambda path: (path.parent / "more.parquet").write_bytes(b""), "is not in its manifest"),
        (lambda path: (path.parents[1] / MANIFEST_NAME).write_text("["), "not valid JSON"),
        (lambda path: (path.parents[1] / MANIFEST_NAME).unlink(), "make one with: jllm manifest"),
    ],
    ids=["changed", "missing", "added", "no JSON", "no manifest"],
)
def test_a_set_that_is_not_what_it_says(
    shuffle: Callable[..., End], tmp_path: Path, spoil: Callable[[Path], Any], said: str
) -> None:
    make_set(tmp_path / "set", 30, 2)
    spoil(sorted((tmp_path / "set").rglob("*.parquet"))[1])
    before = contents(tmp_path)
    end = shuffle("-d", tmp_path / "set", "-o", tmp_path / "deep" / "out")
    assert re.search(said, end.mistake), end.mistake
    assert contents(tmp_path) == before


def test_more_files_than_rows(shuffle: Callable[..., End], tmp_path: Path) -> None:
    make_set(tmp_path / "set", 3)
    end = shuffle("-d", tmp_path / "set", "-o", tmp_path / "out", "-n", 9)
    assert "3 rows are dealt to 3 files, not 9" in end.out
    assert len(open_data_set(tmp_path / "out").paths) == 3
