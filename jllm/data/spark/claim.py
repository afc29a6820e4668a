"""Who works in an output folder: a file that a job's driver keeps touching.

On the machine where it was written, a driver whose processes are gone holds nothing. Of a driver elsewhere only the
touches are seen: when none comes for `STALE` seconds, it is gone.

A job that was killed here leaves the temporary folder of its JVM, with the permutation of a shuffle in them; the next
one on the same output removes them.

Guarantees: of two jobs on one folder one works, and the other is refused or goes on when the first is gone.
Cost: a small file every `BEAT` seconds.
"""

import contextlib
import dataclasses
import json
import os
import re
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from jllm.data.spark.files import HadoopFiles
from jllm.errors import UserError
from jllm.guards import notation

BEAT, STALE = 10.0, 45.0
SETTLE = 0.3
"""So long after it was written a claim is looked at again: of two at one moment the last one is there."""

_OF_SPARK = re.compile(r"spark-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DriverProcess:
    """What works for the process of a job.

    Attributes:
        jvm: the process of Spark's driver; None where it is on another machine.
        scratch: the temporary folders that it removes when it ends, unless it is killed; broadcasts are there.
    """

    jvm: int | None = None
    scratch: tuple[str, ...] = ()


ALONE = DriverProcess()


@contextlib.contextmanager
def held(
    files: HadoopFiles, path: str, shown: str, *, driver: DriverProcess = ALONE, beat: float = BEAT
) -> Iterator[None]:
    """Hold the claim at `path` while the block runs.

    Args:
        shown: the folder, for people.
        driver: what works for this process.
        beat: seconds between touches.

    Raises:
        UserError: another job holds it.
    """
    _wait_for_the_dead(files, path, shown)
    mine = {"job": secrets.token_hex(8), "host": socket.gethostname(), "boot": _boot(), "beat": 0}
    mine["processes"] = [[pid, started_at(pid)] for pid in (os.getpid(), driver.jvm) if pid is not None]
    mine["scratch"] = list(driver.scratch)
    files.write(path, json.dumps(mine))
    time.sleep(SETTLE)
    there = _read(files, path)
    if there is None or there.get("job") != mine["job"]:
        raise busy(shown)
    done = threading.Event()
    keeper = threading.Thread(target=_keep, args=(files, path, mine, done, beat), daemon=True)
    keeper.start()
    try:
        yield
    finally:
        done.set()
        keeper.join()


def _remove_scratch(folders: Iterable[str]) -> None:
    """Remove what the JVM of a job that was killed on this machine left in its temporary folders."""
    for folder in map(Path, folders):
        if _OF_SPARK.fullmatch(folder.name) and not folder.is_symlink():
            shutil.rmtree(folder, ignore_errors=True)


def busy(shown: str) -> UserError:
    return UserError(f"-o {shown}: another run is writing there; wait for it, or give another -o")


def _keep(files: HadoopFiles, path: str, mine: dict[str, Any], done: threading.Event, beat: float) -> None:
    while not done.wait(beat):
        mine["beat"] += 1
        with contextlib.suppress(UserError):  # the job itself finds out
            files.write(path, json.dumps(mine))


def _wait_for_the_dead(files: HadoopFiles, path: str, shown: str) -> None:
    """Return when nobody holds the claim.

    Raises:
        UserError: somebody does.
    """
    first = _read(files, path)
    until = time.monotonic() + STALE
    while first is not None and time.monotonic() < until:
        if first.get("host") == socket.gethostname() and first.get("boot") == _boot():
            alive = [started_at(pid) == since for pid, since in first.get("processes", ())]
            if not any(alive):
                _remove_scratch(first.get("scratch", ()))
                return
            if all(alive):
                raise busy(shown)
        time.sleep(0.5)
        now = _read(files, path)
        if now is None or (now.get("job"), now.get("beat")) == (first.get("job"), first.get("beat")):
            first = now
            continue
        raise busy(shown)


def _read(files: HadoopFiles, path: str) -> dict[str, Any] | None:
    """The claim; None where there is none that can be read."""
    try:
        value = notation.loads(files.read(path)) if files.exists(path) else None
    except (UserError, ValueError):  # it is being replaced at this moment, or was cut short
        return None
    return value if isinstance(value, dict) else None


def started_at(pid: int) -> str | None:
    """When a process of this machine began, as its kernel counts; None where there is none that lives."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
