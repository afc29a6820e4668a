"""Work in the background: done, failed with its reason, given up, and what a signal does to it."""

import errno
import os
import signal
import time
from pathlib import Path

import pytest

from jllm.train.checkpoint.background import Background

EXECUTORS = ("process", "thread", "none")


def done(background: Background) -> None:
    deadline = time.monotonic() + 60
    while not background.is_done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_jobs_one_after_the_other(executor: str, tmp_path: Path) -> None:
    background = Background(executor)
    for number in range(3):
        background.begin(lambda number=number: (tmp_path / str(number)).touch())  # type: ignore[misc]
        done(background)
        assert background.failure is None
        assert (tmp_path / str(number)).exists()


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a/file"), "a/file: the disk is full"),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "a/file"), "a/file: the disk is full"),
        (OSError(errno.EIO, os.strerror(errno.EIO), "a/file"), "a/file: Input/output error"),
        (TimeoutError("one process has not written"), "TimeoutError: one process has not written"),
        (ValueError("x" * 5000), "ValueError: xxx"),
    ],
)
def test_a_failure_has_its_reason_and_the_next_job_is_done(executor: str, error: Exception, said: str) -> None:
    def fail() -> None:
        raise error

    background = Background(executor)
    background.begin(fail)
    done(background)
    assert background.failure is not None
    assert background.failure.startswith(said)
    background.begin(lambda: None)
    assert background.is_done(wait=True)
    assert background.failure is None


def test_what_writes_is_killed(tmp_path: Path) -> None:
    """By somebody else, or because the checkpoint is given up."""
    background = Background("process")
    for end in (lambda: os.kill(background._child or 0, signal.SIGKILL), background.give_up):
        background.begin(lambda: time.sleep(600))
        assert not background.is_done()
        end()
        assert background.is_done(wait=True)
        assert background.failure == "what writes it was ended (-9)"


def test_it_ends_with_its_parent(tmp_path: Path) -> None:
    """A run that is killed leaves nothing behind that still writes."""
    child = tmp_path / "child"
    parent = os.fork()
    if parent == 0:
        background = Background("process")
        background.begin(lambda: (child.write_text(str(os.getpid())), time.sleep(600))[0])  # type: ignore[func-returns-value,arg-type,return-value]
        time.sleep(600)
        os._exit(0)
    deadline = time.monotonic() + 60
    while not (child.exists() and child.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    number = int(child.read_text())
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    while Path(f"/proc/{number}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
