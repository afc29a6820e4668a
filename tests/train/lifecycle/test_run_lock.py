"""A folder has one run at a time, whatever became of the runs before."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jllm.errors import UserError
from jllm.train.lifecycle import run_lock
from jllm.train.lifecycle.run_lock import PREFIX, STALE_SECONDS, Holder, RunLock


def lock_of(folder: Path, run: str = "mine", lost: Callable[[str], None] = print) -> RunLock:
    return RunLock(folder, run, lost=lost)


def take(lock: RunLock, wait: float = 0, say: Callable[[str], None] = print) -> RunLock:
    lock.take(wait=wait, say=say)
    return lock


def forge(folder: Path, *, age: float = 0, **changed: Any) -> Path:
    """The lock of somebody else, the newest of the folder, touched `age` seconds ago."""
    path = folder / f"{PREFIX}{len(list(folder.iterdir())) + 7:08d}"
    holder = dataclasses.replace(Holder.here("theirs"), **changed)
    path.write_text(json.dumps(dataclasses.asdict(holder)))
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_a_second_run_is_refused_and_the_first_one_leaves_nothing(tmp_path: Path) -> None:
    first = take(lock_of(tmp_path / "new"))
    with pytest.raises(UserError, match=rf"is in use by another run \(process {os.getpid()} on "):
        take(lock_of(tmp_path / "new"))
    first.release()
    assert list((tmp_path / "new").iterdir()) == []
    take(lock_of(tmp_path / "new")).release()


def test_one_of_many_that_ask_at_once_gets_it(tmp_path: Path) -> None:
    """Also where a stale lock is in the way of all of them."""
    for _ in range(20):
        forge(tmp_path, host="elsewhere", age=STALE_SECONDS + 1)
        start, got = threading.Barrier(8), []

        def ask(start: threading.Barrier = start, got: list[RunLock] = got) -> None:
            lock = lock_of(tmp_path)
            start.wait()
            try:
                got.append(take(lock))
            except UserError:
                return

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(got) == 1
        got[0].release()
        assert list(tmp_path.iterdir()) == []


def test_a_killed_process_leaves_a_stale_lock(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib, time; from jllm.train.lifecycle.run_lock import RunLock\n"
        "RunLock(pathlib.Path(sys.argv[1]), 'r', lost=print).take(wait=0, say=print)\n"
        "print('held', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=rf"process {child.pid} on"):
        take(lock_of(tmp_path))
    child.send_signal(signal.SIGKILL)
    child.wait()
    take(lock_of(tmp_path)).release()
    child.stdout.close()


def test_a_process_id_that_is_used_again_holds_nothing(tmp_path: Path) -> None:
    forge(tmp_path, started=1)  # this process's number, and not this process
    take(lock_of(tmp_path)).release()


@pytest.mark.parametrize("changed", [{"host": "elsewhere"}, {"boot": "earlier"}, {"namespace": "pid:[1]"}])
def test_a_holder_that_cannot_be_looked_up_is_stale_by_the_clock_alone(tmp_path: Path, changed: dict[str, str]) -> None:
    forge(tmp_path, process=2**22 + 1, age=STALE_SECONDS - 30, **changed)
    with pytest.raises(UserError, match="is in use by another run"):
        take(lock_of(tmp_path))
    forge(tmp_path, process=2**22 + 1, age=STALE_SECONDS + 5, **changed)
    take(lock_of(tmp_path)).release()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"run": 1}'])
def test_a_lock_that_says_nothing_is_stale_by_the_clock(tmp_path: Path, content: str) -> None:
    path = tmp_path / f"{PREFIX}00000003"
    path.write_text(content)
    with pytest.raises(UserError, match=r"another run \(unknown\)"):
        take(lock_of(tmp_path))
    os.utime(path, (time.time() - STALE_SECONDS - 5,) * 2)
    take(lock_of(tmp_path)).release()


def test_waiting_ends_with_the_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "POLL_SECONDS", 0.05)
    first = take(lock_of(tmp_path))
    threading.Timer(0.3, first.release).start()
    said: list[str] = []
    take(lock_of(tmp_path), wait=20, say=said.append).release()
    assert len(said) == 1
    assert "waiting up to 20 s" in said[0]


def test_a_lock_is_touched_and_its_loss_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A holder that stood still for too long finds another one in its place, and does not remove that one's lock."""
    monkeypatch.setattr(run_lock, "TOUCH_SECONDS", 0.05)
    lost = threading.Event()
    lock = take(lock_of(tmp_path, lost=lambda _: lost.set()))
    [path] = tmp_path.iterdir()
    os.utime(path, (0, 0))
    deadline = time.monotonic() + 10
    while path.stat().st_mtime == 0 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert path.stat().st_mtime > 0
    other = forge(tmp_path, host="elsewhere")
    assert lost.wait(10)
    lock.release()
    assert list(tmp_path.iterdir()) == [other]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written to"):
        take(lock_of(tmp_path / "file/run"))
