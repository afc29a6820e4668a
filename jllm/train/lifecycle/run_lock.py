"""One run, one folder: the lock that a run holds on a folder that it writes to.

The lock is a file that says who holds it: the run, its host, boot, process-id namespace, process and when that was
started. The holder touches it every `TOUCH_SECONDS`. Where the process can be looked up (same host, boot and
namespace) and is gone, the lock is stale at once; otherwise when nobody has touched it for `STALE_SECONDS`, by the
clock of the file system: requeued jobs land on other nodes, whose clocks differ, and containers use process ids again.

Locks have generations, and the highest one counts. A stale lock is never removed to make room: who wants it makes the
next generation, which a file system lets one of many do, and then removes the ones before.

Guarantees: of any number of runs that ask at once one gets the lock. It appears complete or not at all, so a run killed
at any moment leaves none or a stale one. A holder that finds a higher generation (it stood still for too long) ends.
Cost: one small file; a touch every 20 seconds.
"""

import contextlib
import dataclasses
import errno
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jllm.errors import UserError
from jllm.guards import notation

PREFIX = ".run-lock-"
TOUCH_SECONDS = 20.0
STALE_SECONDS = 120.0
POLL_SECONDS = 1.0
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""What file systems without hard links say (FAT, many that are mounted from an object store)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Holder:
    """Who holds a lock.

    Attributes:
        run: the run's id.
        token: of this start of the run.
        host, boot, namespace: where its process can be looked up.
        process, started: the process, and when it was started, in the kernel's ticks since boot.
    """

    run: str
    token: str
    host: str
    boot: str
    namespace: str
    process: int
    started: int

    @classmethod
    def here(cls, run: str) -> "Holder":
        """This process."""
        process = os.getpid()
        return cls(
            run=run,
            token=uuid.uuid4().hex,
            host=socket.gethostname(),
            boot=_boot(),
            namespace=_namespace(),
            process=process,
            started=_started(process) or 0,
        )

    @property
    def is_gone(self) -> bool:
        """Whether the process is known to have ended; False where it cannot be looked up from here."""
        if (self.host, self.boot, self.namespace) != (socket.gethostname(), _boot(), _namespace()):
            return False
        return _started(self.process) != self.started


class RunLock:
    """The lock of one folder, taken by `take` and given back by `release`.

    Args:
        folder: is made where it is missing.
        run: the run's id.
        lost: called, on a thread, when somebody else has taken the lock.
    """

    def __init__(self, folder: Path, run: str, *, lost: Callable[[str], None]) -> None:
        self.folder = folder
        self._holder = Holder.here(run)
        self._lost = lost
        self._path: Path | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self, *, wait: float, say: Callable[[str], None]) -> None:
        """Get the lock, waiting for a stale or released one.

        Args:
            wait: seconds to wait for a holder at most; 0: not at all.
            say: is told once that somebody is waited for.

        Raises:
            UserError: another run holds the folder, or it cannot be written to.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            deadline = time.monotonic() + wait
            told = False
            while not self._try():
                holder = _shown(_newest(self.folder))
                if time.monotonic() >= deadline:
                    raise UserError(
                        f"{self.folder} is in use by another run ({holder}); wait for it, end it, or give another"
                        " folder"
                    )
                if not told:
                    say(f"{self.folder} is in use ({holder}); waiting up to {wait:.0f} s for it")
                    told = True
                time.sleep(min(POLL_SECONDS, max(0.0, deadline - time.monotonic())))
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written to: {error.strerror}; give another folder") from None
        self._thread = threading.Thread(target=self._keep, name="run-lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give the lock back; nobody else's is touched."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._path is not None:
            with contextlib.suppress(OSError):
                self._path.unlink()
            self._path = None

    def _try(self) -> bool:
        """Take the lock where nobody holds it or its holder is gone; whether that worked."""
        newest = _newest(self.folder)
        if newest is not None and not _is_stale(newest):
            return False
        number = 1 + (0 if newest is None else _generation(newest))
        mine = self.folder / f"{PREFIX}{number:08d}"
        # A link appears with its content or not at all, and only where there is no such name yet.
        complete = self.folder / f"{PREFIX}{self._holder.token}.tmp"
        with complete.open("x", encoding="utf-8") as file:
            json.dump(dataclasses.asdict(self._holder), file)
            file.flush()
            os.fsync(file.fileno())
        try:
            _give_name(complete, mine)
        except FileExistsError:
            return False
        finally:
            complete.unlink()
        if _newest(self.folder) != mine:  # the look at the folder fell between a new lock and the end of the one before
            mine.unlink()
            return False
        for path in _locks(self.folder):
            if path != mine:
                path.unlink(missing_ok=True)
        self._path = mine
        return True

    def _keep(self) -> None:
        assert self._path is not None
        while not self._ended.wait(TOUCH_SECONDS):
            try:
                newest = _newest(self.folder)
                if newest != self._path:
                    self._lost(f"{self.folder} was taken by another run ({_shown(newest)})")
                    return
                os.utime(self._path)
            except OSError:
                continue  # a file system that is away for a moment; the next touch tells


def _locks(folder: Path) -> list[Path]:
    """The locks of a folder, the highest generation last."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdecimal()]
    return sorted(found, key=_generation)


def _newest(folder: Path) -> Path | None:
    return max(_locks(folder), key=_generation, default=None)


def _generation(path: Path) -> int:
    return int(path.name.removeprefix(PREFIX))


def _give_name(complete: Path, name: Path) -> None:
    """Let `name` be a copy of a file. Raises FileExistsError where it is there already, for all askers but one."""
    try:
        os.link(complete, name)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # A run killed here leaves a lock that nobody can read, which is stale after `STALE_SECONDS`.
        with name.open("x", encoding="utf-8") as file:
            file.write(complete.read_text(encoding="utf-8"))
            file.flush()
            os.fsync(file.fileno())


def _is_stale(path: Path) -> bool:
    """Whether a lock's holder is known to be gone, or has not touched it for too long."""
    try:
        touched = path.stat().st_mtime
    except FileNotFoundError:
        return False  # released just now: look again
    holder = _read(path)
    if holder is not None and holder.is_gone:
        return True
    return _clock(path.parent) - touched > STALE_SECONDS


def _clock(folder: Path) -> float:
    """The time that the file system gives to a file that is touched now."""
    probe = folder / f"{PREFIX}{uuid.uuid4().hex}.clock"
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink()


def _read(path: Path) -> Holder | None:
    """Who holds a lock; None where it is gone, or nobody can tell from it."""
    try:
        found: dict[str, Any] = notation.read_json(path)
        return Holder(**found)
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _shown(path: Path | None) -> str:
    holder = None if path is None else _read(path)
    return "unknown" if holder is None else f"process {holder.process} on {holder.host}"


def _boot() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    return ""


def _namespace() -> str:
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def _started(process: int) -> int | None:
    """When a process was started, in ticks since boot; None where it is gone."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])
