"""What a person sees: nothing too often, and only what is known."""

from pathlib import Path

import pytest

from jllm.data.prepare import progress as module
from jllm.data.prepare.progress import Progress
from jllm.data.prepare.totals import Tally, Totals
from jllm.data.sources.inputs import resolve


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
