"""kill -9 at random moments: running the command again gives the undisturbed result and keeps finished work."""

import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from jllm.data.dataset.manifest import open_data_set
from jllm.data.shuffle.data_set import Resources, shuffle_set
from jllm.data.shuffle.repartition import make_plan, recover, repartition
from tests.data.sets import content, make_set
from tests.forks import context

MOMENTS = max(4, int(8 * float(os.environ.get("JLLM_TEST_SIZE", "1"))))
pytestmark = pytest.mark.slow


def shuffle(folder: Path) -> None:
    # Too little memory for the rows, so that there are scratch files to leave behind.
    limits = Resources(cores=2, memory=3 << 20)
    shuffle_set(open_data_set(folder / "in"), folder / "out", blocks=6, seed=3, resources=limits)


def deal(folder: Path) -> None:
    recover(folder / "D")
    repartition(folder / "D", make_plan(folder / "D", 4, None))


def kill_at_work(command: Callable[[Path], None], folder: Path, fresh: Callable[[], None], after: float) -> None:
    """Start the command and kill it after some seconds; where it was done by then, anew and after fewer."""
    while True:
        fresh()
        process = context.Process(target=command, args=(folder,))
        process.start()
        process.join(after)
        killed = process.is_alive()
        process.kill()
        process.join()
        if killed:
            return
        assert process.exitcode == 0
        after *= 0.7


def undisturbed(command: Callable[[Path], None], folder: Path) -> float:
    """Seconds that the command takes."""
    process = context.Process(target=command, args=(folder,))
    begin = time.monotonic()
    process.start()
    process.join()
    assert process.exitcode == 0
    return time.monotonic() - begin


def identity(folder: Path, pattern: str) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob(pattern)}


def test_shuffle(
    tmp_path: Path,
) -> None:
    make_set(tmp_path / "in", 12_000, files=5, longest=300)
    undisturbed(shuffle, tmp_path)  # the first one also waits for the server to start
    expected = content(tmp_path / "out")

    def fresh() -> None:
        for path in (tmp_path / "out").iterdir():
            path.unlink()

    rng = random.Random(5)
    resumed = 0
    seconds = 0.5
    for _ in range(MOMENTS):
        kill_at_work(shuffle, tmp_path, fresh, rng.uniform(0.02, seconds))
        done = {
            path: stamp
            for path, stamp in identity(tmp_path / "out", "*.parquet").items()
            if path.with_name(f".{path.name}.json").exists() and path.name[0] != "."
        }
        resumed += bool(done)
        seconds = 0.7 * seconds + 0.3 * (0.05 + undisturbed(shuffle, tmp_path))
        assert content(tmp_path / "out") == expected
        after = identity(tmp_path / "out", "*.parquet")
        assert all(after[path] == stamp for path, stamp in done.items()), "finished work was done again"
    print(f"{MOMENTS} runs killed, {resumed} resumed with finished blocks")


def test_repartition(
    tmp_path: Path,
) -> None:
    make_set(tmp_path / "set-00000", 400, files=40)
    rows = content(tmp_path / "set-00000")

    def fresh() -> None:
        for path in sorted((tmp_path / "D").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        folder = tmp_path / "D/set-00000"
        for name, data in rows.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    fresh()
    undisturbed(deal, tmp_path)
    expected = content(tmp_path / "D")
    rng = random.Random(6)
    seconds = 0.1
    for _ in range(MOMENTS):
        kill_at_work(deal, tmp_path, fresh, rng.uniform(0.005, seconds))
        seconds = 0.7 * seconds + 0.3 * (0.02 + undisturbed(deal, tmp_path))
        assert content(tmp_path / "D") == expected
        assert sorted(os.listdir(tmp_path)) == ["D", "set-00000"]
