"""The real model that several tests need, converted once; and how tests are dealt to cores.

Tests run on all cores at a time, so none of them takes several: threads that wait for each other on cores that are busy
make small products a hundred times slower. A file's tests stay together, for they share what is dear to make; pages are
one file of long tests that share nothing. What takes longest begins first, or one core would be left with it. What
forks comes before what compiles: a process that has compiled is large, and a fork of it dear.
"""

import collections
import gc
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch
ROOT = Path(__file__).resolve().parent.parent
FIRST = ("spark/", "pages/", "distributed/", "data/", "security/", "commands/", "models/test_compiled.py")
"""Below `tests/`, what begins first, in turn."""
APART = ("test_a_page_runs_from_top_to_bottom",)
"""Tests whose cases share nothing."""
GGUF = "gguf/SmolLM2-135M-Instruct.Q4_1.gguf"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Group and order tests as the top of this file says, for `--dist loadgroup`."""

    def turn(item: pytest.Item) -> int:
        place = item.path.relative_to(ROOT / "tests").as_posix()
        return next((turn for turn, name in enumerate(FIRST) if place.startswith(name)), len(FIRST))

    for item in items:
        is_apart = getattr(item, "originalname", None) in APART
        item.add_marker(pytest.mark.xdist_group(item.name if is_apart else f"{item.path.parent.name}/{item.path.name}"))
    items.sort(key=turn)


def pytest_collection_finish() -> None:
    """What all test files have imported is there to the end: collections before forks, and others, pass it over."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """With `--durations=N`, the N slowest files too, set-ups included."""
    count = terminalreporter.config.getoption("durations")
    seconds: dict[str, float] = collections.defaultdict(float)
    for report in itertools.chain.from_iterable(terminalreporter.stats.values()):
        if isinstance(report, pytest.TestReport):
            seconds[report.nodeid.split("::")[0]] += report.duration
    if count is None or not seconds:
        return
    terminalreporter.section(f"slowest {count or len(seconds)} files")
    for name, spent in sorted(seconds.items(), key=lambda entry: -entry[1])[: count or None]:
        terminalreporter.write_line(f"{spent:8.2f}s  {name}")


@pytest.fixture(scope="session")
def real_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder, by `tools/gguf2hf.py`. Tests must not change it."""
    assets = Path(os.environ.get("JLLM_ASSETS") or Path.home() / ".cache" / "jllm-assets")
    if not (assets / GGUF).is_file():
        pytest.skip(f"{assets / GGUF} is not there; bring it with: make assets")
    folder = tmp_path_factory.mktemp("real") / "model"
    command = [sys.executable, ROOT / "tools" / "gguf2hf.py", "-i", assets / GGUF, "-o", folder]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert result.returncode == 0, result.stderr
    return folder
