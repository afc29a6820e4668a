"""What a person sees: nothing too often, and only what is known."""

import json
from pathlib import Path

import pytest

from jllm.data.dataset.manifest import open_data_set
from jllm.data.prepare.reporting import progress as module
from jllm.data.prepare.reporting.progress import MOST_FIELDS, Progress, notes
from jllm.data.prepare.reporting.totals import Tally, Totals
from jllm.data.sources.inputs import resolve
from tests.data.raw2ids_runs import raw2ids


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def totals_of(megabytes: int) -> Totals:
    sizes = [{"documents": megabytes, "document_tokens": 1_000_000 * megabytes}]
    return Totals(sets=[Tally(sources=sizes)], encoded_bytes=megabytes * 10**6, read_bytes=megabytes * 10**6)


@pytest.mark.parametrize("packed", [False, True])
def test_a_line_every_few_seconds(
    tmp_path: Path, clock: list[float], capsys: pytest.CaptureFixture[str], packed: bool
) -> None:
    path = tmp_path / ("a.jsonl.gz" if packed else "a.jsonl")
    with path.open("wb") as file:
        file.truncate(100 * 10**6)
    sources = resolve([str(path)])
    progress = Progress()
    for second in range(21):
        clock[0] = 100.0 + second
        progress.show(totals_of(2 * second), sources)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3  # after 10 seconds, and each 5 after that
    assert lines[0].startswith("20 MB  20 documents  20,000,000 tokens  2.0 MB/s  2.00 M tokens/s")
    assert lines[0].endswith("2.00 M tokens/s" if packed else "  0:40 left"), "of a packed file nobody knows"
    assert progress.seconds == 20


def test_quiet_says_nothing(tmp_path: Path, clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(quiet=True)
    clock[0] += 100
    progress.show(totals_of(5), [])
    progress.end()
    assert capsys.readouterr().err == ""


def test_what_was_left_out_is_told() -> None:
    counts = {"records": 9, "left out: few": 1, "left out: many": 2000, "unused field: context": 3}
    assert notes(counts) == [
        "  left out: 2,000 x many",
        "  left out: 1 x few",
        "  fields that nothing was made of: context 3",
    ]
    assert notes({"records": 9}) == []
    (line,) = notes({f"unused field: f{number}": 1 for number in range(MOST_FIELDS + 5)})
    assert line.endswith("and 5 more")


def test_the_summary_and_the_manifest_name_what_was_left_out(tmp_path: Path, byte_tokenizer: Path) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    records = [{"messages": messages, "context": "c"}, {"messages": [*messages, messages[0]]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    arguments = ["-i", tmp_path / "a.jsonl", "--tokenizer", byte_tokenizer, "--chat_template", "chatml"]
    said = raw2ids(*arguments, "-o", tmp_path / "out").stdout
    assert "  left out: 1 x messages after the last answer\n" in said
    assert "  fields that nothing was made of: context 1\n" in said
    chat = open_data_set(tmp_path / "out").manifest.extra["chat"]
    assert chat["left_out"] == {"messages after the last answer": 1}
    assert chat["unused_fields"] == {"context": 1}
    assert open_data_set(tmp_path / "out").manifest.options["join"] == "\n\n"
    refused = raw2ids(*arguments, "-o", tmp_path / "x", "-t", "pretrain", "--join", "", check=False)
    assert (refused.returncode, refused.stderr) == (2, "error: --join: only for -t ft\n")
