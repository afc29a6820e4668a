"""The work of a run, whoever does it: the same bytes for any number of workers, and nothing lost with one of them."""

import bz2
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jllm.data.prepare import conversion
from jllm.data.prepare import run as prepare
from jllm.data.prepare.config import Raw2IdsConfig
from jllm.data.sources import chunks
from jllm.data.sources.chunk import Chunk
from tests.data.raw2ids_runs import documents, finished_files, raw2ids, tree, write_jsonl

CORES = (1, 2, 3, 8)
FEW = CORES if os.environ.get("JLLM_TEST_SIZE", "1") != "1" else (1, 3)
EXAMPLES = 4 * int(os.environ.get("JLLM_TEST_SIZE", "1"))


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1 << 11)


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """Every format and compression, with bad records."""
    folder = tmp_path / "in"
    folder.mkdir()
    texts = documents(240, seed=3)
    lines = [json.dumps({"text": text}) for text in texts]
    lines[100:100] = ["{", "", '{"text": null}', '{"text": 3}', '{"other": 1}']
    (folder / "a.jsonl").write_text("\n".join(lines))
    (folder / "b.txt").write_text("\n\n".join(texts[:90]) + "\n\n\n")
    (folder / "c.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[:120]).encode()))
    (folder / "d.json").write_text(json.dumps([{"text": text} for text in texts[120:200]]))
    (folder / "e.txt.bz2").write_bytes(bz2.compress("\n\n".join(texts[:80]).encode()))
    pq.write_table(pa.table({"text": [*texts[:60], None]}), folder / "f.parquet", row_group_size=25)
    return folder


@pytest.mark.parametrize(
    "options",
    [
        ["--stack", "--max_len", 65, "-n", 150, "--batch_size", 60],
        ["--stack", "--max_len", 65, "--sequence_prefix", "a", "--eval_fraction", 0.2, "--mask_tokens"],
        ["--packing", "best_fit", "--max_len", 129, "-n", 300, "--eval_fraction", 0.1],
        [
            "--max_len",
            33,
            "--stride",
            20,
            "--batch_size",
            100,
            "--control_class",
            "*.txt=+1",
            "--control_class",
            "*=random",
        ],
        ["--stack", "--max_len", 65, "--max_tokens", 9_000],
        ["--max_len", 65, "--max_rows", 133, "-c", "snappy"],
    ],
    ids=["stack", "prefix, held out", "best fit", "windows, classes", "max_tokens", "max_rows"],
)
def test_the_number_of_workers_leaves_no_trace(
    tmp_path: Path,
    byte_tokenizer: Path,
    sources: Path,
    options: list[object],
    small_chunks: None,
    request: pytest.FixtureRequest,
) -> None:
    trees, said = [], []
    for cores in CORES if "stack" in request.node.callspec.id else FEW:
        out = tmp_path / str(cores) / "out"
        words = ["-i", sources, "-o", out, "--tokenizer", byte_tokenizer, "-t", "pretrain", "--on_error", "skip"]
        result = raw2ids(*words, *options, "--cores", cores, "--bad_records", tmp_path / str(cores) / "bad.jsonl")
        trees.append(tree(tmp_path / str(cores)))
        said.append(result.stdout.replace(str(out.parent), "").split("\n", 1)[1])
    assert trees[0].keys() == trees[1].keys()
    assert all(each == trees[0] for each in trees[1:])
    assert all(each == said[0] for each in said[1:])
    threads = raw2ids(*words[:3], tmp_path / "threads" / "out", *words[4:], *options, "--cores", 3, "-T")
    assert threads.returncode == 0
    without = {name: data for name, data in trees[0].items() if name != "bad.jsonl"}
    assert tree(tmp_path / "threads") == without


@pytest.mark.parametrize(
    "options", [[], ["--packing", "best_fit", "--pad"], ["--eval_fraction", 0.2, "--filter"]], ids=str
)
def test_chats(tmp_path: Path, byte_tokenizer: Path, options: list[object], small_chunks: None) -> None:
    rng = np.random.default_rng(1)
    turns = [[{"user": text}, {"assistant": text[-90:]}] * int(rng.integers(1, 9)) for text in documents(120)]
    lines = [json.dumps(each) for each in turns]
    lines[50:50] = ["[", json.dumps([{"user": "alone"}])]
    source = tmp_path / "chat.jsonl"
    source.write_text("\n".join(lines))
    words = ["-i", source, "--tokenizer", byte_tokenizer, "--chat_template", "chatml", "--max_len", 100]
    for cores in FEW if options else CORES:
        bad = tmp_path / str(cores) / "bad.jsonl"
        raw2ids(
            *words, *options, "-o", bad.with_name("out"), "--cores", cores, "--batch_size", 300, "--bad_records", bad
        )
    found = [tree(folder) for folder in sorted(tmp_path.iterdir()) if folder.name.isdigit()]
    assert all(each == found[0] for each in found)
    assert [json.loads(line)["line"] for line in found[0]["bad.jsonl"].splitlines()] == [51, 52]


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(1, 400), min_size=1, max_size=40),
    chunk=st.sampled_from([256, 1000, 4096]),
    length=st.integers(5, 80),
    per_split=st.integers(9, 50),
    per_file=st.integers(4, 50),
    how=st.sampled_from(["stack", "best_fit", "windows"]),
)
def test_any_documents(
    tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Path, sizes: list[int], chunk: int, length: int,
    per_split: int, per_file: int, how: str,
) -> None:  # fmt: skip
    """Of any lengths, in chunks and files of any size."""
    folder = tmp_path_factory.mktemp("any")
    texts = [f"{number} {'word ' * size}" for number, size in enumerate(sizes)]
    source = write_jsonl(folder / "some.jsonl", texts)
    config: dict[str, Any] = {
        "input": (str(source),), "tokenizer": str(byte_tokenizer), "type": "pretrain", "quiet": True,
        "max_len": length, "num": per_split, "batch_size": per_file, "stack": how == "stack",
        "packing": "best_fit" if how == "best_fit" else "none",
    }  # fmt: skip
    found = []
    for cores, size in ((1, chunk), (3, chunk), (2, 1 << 20)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(chunks, "CHUNK_BYTES", size)
            prepare.prepare(Raw2IdsConfig(**config, output=folder / f"{cores}" / "out", cores=cores))
        found.append({name: data for name, data in tree(folder / f"{cores}").items() if name.endswith(".parquet")})
    assert found[0]
    assert found[1] == found[0]
    assert found[2] == found[0], "chunks are cut for workers, and are nowhere to be seen"


@pytest.mark.parametrize("places", [[0], [150], [299], [120, 270]])
def test_large_documents_among_small_ones(
    tmp_path: Path, byte_tokenizer: Path, small_chunks: None, monkeypatch: pytest.MonkeyPatch, places: list[int]
) -> None:
    """They are begun as soon as some worker has something to do, wherever they stand."""
    begun: list[tuple[int, int]] = []
    encode = conversion._Queue.encode

    def watched(self: conversion._Queue, number: int, chunk: Chunk) -> None:
        begun.append((number, chunk.data))
        encode(self, number, chunk)

    monkeypatch.setattr(conversion._Queue, "encode", watched)
    texts = documents(300)
    for place in places:
        texts[place] = " ".join(documents(3000))
    source = write_jsonl(tmp_path / "some.jsonl", texts)
    for cores in (1, 3):
        begun.clear()
        words = ["-i", source, "-o", tmp_path / str(cores) / "out", "--tokenizer", byte_tokenizer, "-t", "pretrain"]
        raw2ids(*words, "--stack", "--max_len", 65, "--batch_size", 100, "--cores", cores)
        large = [turn for turn, (_, size) in enumerate(begun) if size > conversion.LARGE * chunks.CHUNK_BYTES]
        assert len(large) == len(places)
        assert large[0] <= 6
        assert max(begun[turn][0] for turn in large) > 6 or places == [0]
        assert sorted(number for number, _ in begun) == list(range(len(begun)))
    assert tree(tmp_path / "1") == tree(tmp_path / "3")


# What becomes of the processes.


def command(source: Path, out: Path, tokenizer: Path, *words: object) -> list[str]:
    line = ["-i", source, "-o", out, "--tokenizer", tokenizer, "-t", "pretrain", "--stack", "--max_len", 65, "--quiet"]
    code = "from jllm.data.sources import chunks\nchunks.CHUNK_BYTES = 1 << 14\nfrom jllm.raw2ids import run\nrun()"
    return [sys.executable, "-c", code, *map(str, [*line, "--batch_size", 1500, *words])]


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def begun(process: "subprocess.Popen[bytes]", out: Path) -> list[int]:
    """The workers of a command that has finished its first file."""
    end = time.monotonic() + 60
    while not finished_files(out):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.01)
    return children_of(process.pid)


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("how", ["worker", "kill", "term", "int"])
def test_a_run_that_is_ended_is_gone_on_with(tmp_path: Path, byte_tokenizer: Path, how: str) -> None:
    source = write_jsonl(tmp_path / "some.jsonl", documents(5000, seed=2) * 4)
    assert subprocess.run(command(source, tmp_path / "whole" / "out", byte_tokenizer), stdout=-3).returncode == 0
    out = tmp_path / "ended" / "out"
    line = command(source, out, byte_tokenizer, "--cores", 8)
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    workers = begun(process, out)
    kept = finished_files(out)
    if how == "worker":
        os.kill(workers[3], signal.SIGKILL)
    else:
        process.send_signal({"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}[how])
    _, said = process.communicate(timeout=60)
    if how == "worker":
        assert process.returncode == 2
        assert said.decode().count("\n") == 1
        assert "a worker process was ended by SIGKILL" in said.decode()
    else:
        assert process.returncode != 0
    end = time.monotonic() + 20
    while any(map(is_there, workers)):
        assert time.monotonic() < end, "a worker was left behind"
        time.sleep(0.01)
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
    assert tree(tmp_path / "ended") == tree(tmp_path / "whole")
    assert all(path.stat().st_ino == inode for path, inode in kept.items())


def test_a_finished_data_set_starts_nothing(
    tmp_path: Path, byte_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "some.jsonl", documents(10))
    config = Raw2IdsConfig(
        input=(str(source),), tokenizer=str(byte_tokenizer), type="pretrain", output=tmp_path / "out", quiet=True
    )
    made = prepare.prepare(config)

    def started(*arguments: Any, **named: Any) -> Any:
        raise AssertionError("started")

    monkeypatch.setattr(prepare, "EarlyEngines", started)
    monkeypatch.setattr("jllm.data.prepare.conversion.Workers", started)
    assert prepare.prepare(config).files == made.files
