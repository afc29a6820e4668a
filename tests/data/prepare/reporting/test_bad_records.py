"""`--bad_records FILE`: each bad record once, in order, however the run went; and files that may not be overwritten."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jllm.data.prepare.reporting.bad_records import BadRecordLog, check_target
from jllm.data.sources.inputs import resolve
from jllm.data.sources.records import BadRecord
from jllm.errors import UserError
from tests.data.raw2ids_runs import raw2ids

EXAMPLES = 40 * int(os.environ.get("JLLM_TEST_SIZE", "1"))
records = st.builds(BadRecord, kind=st.text(max_size=5), line=st.integers(1, 99), detail=st.text(max_size=9))


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@settings(max_examples=EXAMPLES, deadline=None)
@given(chunks=st.lists(st.lists(records, max_size=3), max_size=6), cut=st.integers(0, 6), torn=st.booleans())
def test_each_once_whenever_the_run_was_killed(
    tmp_path_factory: pytest.TempPathFactory, chunks: list[list[BadRecord]], cut: int, torn: bool
) -> None:
    work = tmp_path_factory.mktemp("work")
    places = [(index // 2, index % 2) for index in range(len(chunks))]
    first = BadRecordLog(work)
    for place, bad in zip(places, chunks, strict=True):
        first.add(place, "name", bad)
    if torn:
        with (work / "bad records").open("a") as file:
            file.write('{"chunk": [9, 9], "rec')
    again = BadRecordLog(work)
    again.resume((cut // 2, cut % 2))
    for place, bad in zip(places[cut:], chunks[cut:], strict=True):
        again.add(place, "name", bad)
    again.write_to(work / "out.jsonl")
    wanted = [bad for chunk in chunks for bad in chunk]
    assert lines_of(work / "out.jsonl") == [
        {"file": "name", "line": bad.line, "kind": bad.kind, "reason": bad.detail} for bad in wanted
    ]


@pytest.mark.parametrize("count", [3, 30])
@pytest.mark.parametrize("good", [0, 5])
def test_all_are_written_also_where_the_run_fails(tmp_path: Path, byte_tokenizer: Path, count: int, good: int) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text('{"text": null}\n' * count)
    (tmp_path / "in" / "b.jsonl").write_text('{"text": "good"}\n' * good + "[1,\n")
    target = tmp_path / "deep" / "bad.jsonl"
    words = ["-i", tmp_path / "in", "-o", tmp_path / "out", "--tokenizer", byte_tokenizer, "-t", "pretrain"]
    done = raw2ids(*words, "--bad_records", target, check=False)
    assert done.returncode == (2 if count == 30 or not good else 0)
    found = lines_of(target)
    assert [(each["file"], each["line"]) for each in found] == [
        *(("a.jsonl", line) for line in range(1, count + 1)),
        ("b.jsonl", good + 1),
    ]
    assert found[0]["reason"] == '"text" is null'
    if done.returncode == 0:
        again = raw2ids(*words, "--bad_records", target, check=False)
        assert again.returncode == 2
        assert "make it anew with -C" in again.stderr
    elif good:
        raw2ids(*words, "--on_error", "skip", "--bad_records", target)
        assert lines_of(target) == found
    else:
        assert not (tmp_path / "out").exists()


def test_files_that_may_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text("{}\n")
    inputs = [str(tmp_path / "in")]
    sources = resolve(inputs)
    check_target(tmp_path / "new" / "bad.jsonl", inputs, sources)
    for name, said in (
        ("in/a.jsonl", "is an input"),
        ("in/bad.jsonl", "lies in the input folder"),
        ("in", "no regular file"),
        ("in/a.jsonl/bad", "lies in the input folder"),
    ):
        with pytest.raises(UserError, match=said):
            check_target(tmp_path / name, inputs, sources)
    with pytest.raises(UserError, match="no folder that can be written to"):
        check_target(tmp_path / "in" / "a.jsonl" / "bad", [str(tmp_path / "in" / "a.jsonl")], sources)
