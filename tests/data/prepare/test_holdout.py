"""Held-out documents: the same ones however the run goes, none of them trained on, none lost."""

import itertools
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jllm.data.dataset.manifest import open_data_set, read_manifest
from jllm.data.dataset.shards import CU_SEQLENS, INPUT_IDS, ShardReader
from jllm.data.packing.documents import Documents
from jllm.data.prepare import holdout
from jllm.data.prepare.holdout import held_out
from tests.data.raw2ids_runs import documents, raw2ids, reference_stream, rows_of, tree, write_jsonl

EXAMPLES = 50 * int(os.environ.get("JLLM_TEST_SIZE", "1"))
LENGTH = 65
KINDS = {
    "stack": ["-t", "pretrain", "--stack", "--max_len", LENGTH],
    "best_fit": ["-t", "pretrain", "--packing", "best_fit", "--max_len", 400],
    "alone": ["-t", "pretrain", "--max_len", 400],
    "ft": ["--chat_template", "chatml", "--max_len", 400],
}


def of_rows(rows: list[list[int]]) -> Documents:
    ids = np.array([index for row in rows for index in row], dtype=np.int32)
    return Documents(ids=ids, offsets=np.r_[0, np.cumsum([len(row) for row in rows])].astype(np.int64))


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(0, 5), max_size=9), min_size=1, max_size=20),
    cut=st.integers(0, 20),
    seed=st.integers(0, 3),
    chunk=st.integers(1, 7),
)
def test_the_choice_depends_on_the_document_alone(rows: list[list[int]], cut: int, seed: int, chunk: int) -> None:
    whole = held_out(of_rows(rows), 0.5, seed).tolist()
    chosen: dict[tuple[int, ...], bool] = {}
    for row, counts in zip(rows, whole, strict=True):
        assert chosen.setdefault(tuple(row), counts) == counts, "equal documents on both sides"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(holdout, "_STRETCH", chunk)
        parts = [held_out(of_rows(part), 0.5, seed).tolist() for part in (rows[:cut], rows[cut:])]
    assert [*itertools.chain(*parts)] == whole
    assert held_out(of_rows(rows[::-1]), 0.5, seed).tolist() == whole[::-1]


def test_the_fraction_is_what_was_asked_for() -> None:
    rows = of_rows([list(pair) for pair in itertools.product(range(100), repeat=2)])
    for fraction in (0.01, 0.1, 0.5):
        held = held_out(rows, fraction, 1234)
        assert abs(held.mean() - fraction) < 0.02
        assert abs((held & held_out(rows, fraction, 1235)).mean() - fraction**2) < 0.01, "seeds are independent"
        assert np.all(held <= held_out(rows, 2 * fraction - 0.001, 1234)), (
            "a larger fraction holds out the same and more"
        )


def records(kind: str, folder: Path) -> Path:
    texts = documents(400)
    texts += texts[:60]  # real text repeats itself
    if kind != "ft":
        return write_jsonl(folder / "some.jsonl", texts)
    path = folder / "some.jsonl"
    path.write_text("".join(json.dumps([{"user": "q"}, {"assistant": text}]) + "\n" for text in texts))
    return path


def documents_in(kind: str, folder: Path, tokenizer: Path) -> list[tuple[int, ...]]:
    """The documents of a data set, put together from its rows."""
    if kind in ("alone", "ft"):
        return [tuple(row) for row in rows_of(folder)]
    if kind == "best_fit":
        pairs = zip(rows_of(folder), rows_of(folder, CU_SEQLENS), strict=True)
        return [tuple(row[a:b]) for row, bounds in pairs for a, b in itertools.pairwise(bounds)]
    (end,) = reference_stream(tokenizer, [""])[0]
    streams: dict[str, list[int]] = {}
    for path in open_data_set(folder).paths:
        stream = streams.setdefault(path.parent.name, [])
        for batch in ShardReader(path):
            for row in batch.column(INPUT_IDS).to_pylist():
                stream += row[1:] if stream else row
    found = []
    for stream in streams.values():
        ends = [0, *(i + 1 for i, index in enumerate(stream) if index == end)]
        assert ends[-1] == len(stream)
        found += [tuple(stream[a:b]) for a, b in itertools.pairwise(ends)]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_lost_and_nothing_is_on_both_sides(tmp_path: Path, byte_tokenizer: Path, kind: str) -> None:
    arguments = ["-i", records(kind, tmp_path), "--tokenizer", byte_tokenizer, *KINDS[kind]]
    raw2ids(*arguments, "-o", tmp_path / "all")
    whole = documents_in(kind, tmp_path / "all", byte_tokenizer)
    assert len(whole) == 460
    found = {}
    for name, cut in {"a": ["--cores", 1], "b": ["--cores", 2, "-n", 70, "--batch_size", 9]}.items():
        raw2ids(*arguments, *cut, "-o", tmp_path / name, "--eval_fraction", 0.2)
        train, held = (
            documents_in(kind, folder, byte_tokenizer) for folder in (tmp_path / name, tmp_path / "_eval" / name)
        )
        assert not {*train} & {*held}
        assert sorted(train + held) == sorted(whole)
        assert 0.1 < len(held) / len(whole) < 0.3
        found[name] = sorted(held)
        for folder, texts in ((tmp_path / name, train), (tmp_path / "_eval" / name, held)):
            manifest = read_manifest(folder)
            assert manifest is not None
            assert manifest.extra["documents"] == manifest.sources[0]["documents"] == len(texts)
            assert manifest.extra["document_tokens"] == sum(map(len, texts))
            assert manifest.options["eval_fraction"] == 0.2
            assert manifest.tokenizer is not None
            assert not (folder / ".raw2ids").exists()
    assert found["a"] == found["b"]
    raw2ids(*arguments, "-o", tmp_path / "c", "--eval_fraction", 0.2, "--seed", 5)
    assert sorted(documents_in(kind, tmp_path / "_eval" / "c", byte_tokenizer)) != found["a"]
    # Whoever takes all sets of the folder takes no held-out one; these can be taken together too.
    assert {path.parts[-3] for path in open_data_set(tmp_path).paths} == {"all", "a", "b", "c"}
    assert {path.parts[-3] for path in open_data_set(tmp_path / "_eval").paths} == {"a", "b", "c"}


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_at_every_block(
    tmp_path: Path, byte_tokenizer: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is stopped after each block in turn, and while it writes the manifests, leaves what a whole one
    leaves."""
    from jllm.data.prepare import run as prepare
    from jllm.data.prepare.config import Raw2IdsConfig
    from jllm.data.sources import chunks

    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1 << 12)
    folder = tmp_path / "in"
    folder.mkdir()
    records(kind, folder).rename(folder / "first.jsonl")
    records(kind, folder)
    values: dict[str, Any] = {"input": (str(folder),), "tokenizer": str(byte_tokenizer), "quiet": True}
    values |= {"num": 150, "batch_size": 20, "cores": 2, "eval_fraction": 0.15, "stack": kind == "stack"}
    values |= {"packing": kind if kind == "best_fit" else "none", "max_len": 65}
    values |= {"type": "ft", "chat_template": "chatml", "threads": True} if kind == "ft" else {"type": "pretrain"}
    prepare.prepare(Raw2IdsConfig(**values, output=tmp_path / "whole" / "x"))

    class StopError(Exception):
        pass

    write = prepare.write_manifest
    written: list[Path] = []

    def interrupted(place: Path, manifest: Any) -> None:
        write(place, manifest)
        written.append(place)
        if len(written) < 3:
            raise StopError

    monkeypatch.setattr(prepare, "write_manifest", interrupted)
    stops = 0
    while True:
        fed: list[int] = []

        def watch(*_: object, fed: list[int] = fed, limit: int = 2 + stops) -> None:
            fed.append(1)
            if len(fed) > limit:
                raise StopError

        monkeypatch.setattr("jllm.data.prepare.reporting.progress.Progress.show", watch)
        try:
            prepare.prepare(Raw2IdsConfig(**values, output=tmp_path / "stopped" / "x"))
            break
        except StopError:
            stops += 1
            assert stops < 200
            time.sleep(0.02)
    assert stops > 5
    assert len(written) > 2
    assert tree(tmp_path / "stopped") == tree(tmp_path / "whole")


def test_both_folders_are_one_run(tmp_path: Path, byte_tokenizer: Path) -> None:
    source = records("alone", tmp_path)
    arguments = ["-i", source, "-o", tmp_path / "d", "--tokenizer", byte_tokenizer, *KINDS["alone"]]
    held = tmp_path / "_eval" / "d"
    raw2ids(*arguments, "--eval_fraction", 0.1)
    before = tree(tmp_path / "d"), tree(held)
    assert raw2ids(*arguments, "--eval_fraction", 0.1).stdout.count("finished earlier") == 2
    assert (tree(tmp_path / "d"), tree(held)) == before
    for changed in (["--eval_fraction", 0.2], ["--eval_fraction", 0.1, "--seed", 1], []):
        refused = raw2ids(*arguments, *changed, check=False)
        assert refused.returncode == 2
        assert "eval_fraction" in refused.stderr or "seed" in refused.stderr
    # The folder of the held-out documents is nobody else's output.
    other = ["-i", source, "-o", held, "--tokenizer", byte_tokenizer, *KINDS["alone"]]
    assert "part" in raw2ids(*other, "--eval_fraction", 0.1, check=False).stderr
    next(held.rglob("*.parquet")).unlink()
    assert raw2ids(*arguments, "--eval_fraction", 0.1, check=False).returncode == 2
    raw2ids(*arguments, "--eval_fraction", 0.1, "-C")
    assert (tree(tmp_path / "d"), tree(held)) == before
    raw2ids(*arguments, "--eval_fraction", 0.1, "-C", "--eval_output", tmp_path / "elsewhere")
    assert tree(tmp_path / "elsewhere") == tree(held)
    raw2ids(*arguments, "-C")
    assert not held.exists()
    manifest = read_manifest(tmp_path / "d")
    assert manifest is not None
    assert manifest.extra["documents"] == 460
    assert "seed" not in manifest.options


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        *(
            (["--eval_fraction", value], f"--eval_fraction {float(value)}")
            for value in ("0", "1", "-0.5", "1.5", "nan")
        ),
        (["--eval_output", "x"], "--eval_fraction"),
        (["--eval_fraction", "0.5", "--max_rows", "5"], "--max_tokens"),
        (["--eval_fraction", "0.5", "--eval_output", "out/eval"], "--eval_output"),
        (["--eval_fraction", "0.000001"], "holds out none of its 3 documents"),
        (["--eval_fraction", "0.999999"], "holds out all of its 3 documents"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, byte_tokenizer: Path, arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = write_jsonl(tmp_path / "some.jsonl", documents(3))
    result = raw2ids(
        "-i", source, "-o", "out", "--tokenizer", byte_tokenizer, "-t", "pretrain", *arguments, check=False
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert said in result.stderr
