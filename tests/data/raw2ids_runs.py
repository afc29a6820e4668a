"""Runs of raw2ids for tests: inputs, the command, what it made, and what it must make."""

import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jllm.data.dataset.manifest import open_data_set
from jllm.data.dataset.shards import INPUT_IDS, ShardReader
from jllm.raw2ids import main

WORDS = ["alpha", "beta", "gamma", "naïve", "日本語", "def f(x):", "  indented", "1234", "don't", "👍🏽"]


def documents(count: int, seed: int = 0, longest: int = 60) -> list[str]:
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, size=random.integers(1, longest))) + f" {number}" for number in range(count)]


def write_jsonl(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def raw2ids(*arguments: object, check: bool = True, own_process: bool = False) -> subprocess.CompletedProcess[str]:
    """The command: in this process, where tokenizers stay loaded, or as a user starts it."""
    words = [str(argument) for argument in arguments]
    if own_process:
        command = [sys.executable, "-m", "jllm.raw2ids", *words]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    else:
        out, err, code = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main(words)
            except SystemExit as end:
                code = int(end.code or 0)
        result = subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())
    assert not check or result.returncode == 0, result.stderr
    return result


def rows_of(folder: Path, column: str = INPUT_IDS) -> list[list[int]]:
    rows: list[list[int]] = []
    for path in open_data_set(folder).paths:
        for batch in ShardReader(path):
            rows += batch.column(column).to_pylist()
    return rows


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def reference_stream(tokenizer: Path, texts: Sequence[str]) -> list[list[int]]:
    import tokenizers

    backend = tokenizers.Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    backend.encode_special_tokens = True
    end = backend.token_to_id("<|endoftext|>")
    return [[*backend.encode(text, add_special_tokens=False).ids, end] for text in texts]


def stacked(streams: list[list[int]], length: int) -> tuple[list[list[int]], list[list[int]]]:
    """The definition, written down naively."""
    stream = [token for document in streams for token in document]
    starts, at = set(), 0
    for document in streams:
        starts.add(at)
        at += len(document)
    rows, boundaries = [], []
    begin = 0
    while begin == 0 or begin + 1 < len(stream):
        row = stream[begin : begin + length]
        if not row:
            break
        rows.append(row)
        boundaries.append(sorted({0, len(row), *(s - begin for s in starts if begin <= s < begin + len(row))}))
        begin += length - 1
    return rows, boundaries


def finished_files(out: Path) -> dict[Path, int]:
    return {path: path.stat().st_ino for path in out.rglob("*.parquet") if ".raw2ids" not in path.parts}
