"""What the machine lets this process use: cores, memory, disk, packages; and sizes as people write them.

Limits of the container (control groups) count as well as those of the machine.
"""

import contextlib
import gc
import importlib
import io
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from jllm.errors import UserError

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_COUNT_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_CGROUP = Path("/sys/fs/cgroup")


def collect_rarely() -> None:
    """Look for cycles of garbage after 50,000 new objects rather than 700: reading JSON makes many objects and no
    cycles, and each look goes through all that are alive."""
    gc.set_threshold(50_000)


def leave_at_once(code: int = 0) -> NoReturn:
    """End a process that has done its work or failed, without taking apart what it holds: 0.12 s for two engines."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # whoever read it has seen enough
            stream.flush()
    os._exit(code)


def usable_cores(wanted: int = -1) -> int:
    """`wanted` workers, or as many as the cores this process may run on where `wanted` is negative.

    Raises:
        UserError: `wanted` is 0, or many times the number of cores.
    """
    if wanted == 0:
        raise UserError("--cores 0: give a number of workers, or -1 for all cores")
    here = len(os.sched_getaffinity(0))
    most = max(64, 8 * here)
    if wanted > most:
        raise UserError(f"--cores {wanted}: this machine lets it use {here}; give at most {most}, or -1 for all cores")
    return wanted if wanted > 0 else here


def parse_memory(option: str, text: str) -> int:
    """Bytes of `512M`, `4G`, `1.5GiB` (powers of 1024).

    Raises:
        UserError: not a size; `option` names where it was given.
    """
    return _parse(option, text, _UNITS, r"([KMGT]?)(?:i?B)?", "a size such as 512M or 4G")


def parse_count(option: str, text: str) -> int:
    """The number of `250000`, `100M`, `1B` (powers of 1000).

    Raises:
        UserError: not a number; `option` names where it was given.
    """
    return _parse(option, text, _COUNT_UNITS, "([KMBT]?)", "a number such as 250000, 100M or 1B")


def parse_duration(option: str, text: str) -> float:
    """Seconds of `23h50m`, `90m`, `2d`, `30s`, or of `23:50:00` and `1-12:00:00` as SLURM writes them.

    Raises:
        UserError: not a duration; `option` names where it was given.
    """
    text = text.strip()
    units = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text, re.IGNORECASE | re.ASCII)
    clock = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", text, re.ASCII)
    parts = (units or clock) and [int(part or 0) for part in (units or clock).groups()]  # type: ignore[union-attr]
    seconds = sum(part * unit for part, unit in zip(parts or (), (86400, 3600, 60, 1), strict=False))
    if not 0 < seconds < 1 << 40:
        raise UserError(f"{option} {text}: give a duration such as 23h50m, 90m or 23:50:00")
    return float(seconds)


def process_seconds() -> float:
    """How long this process has been there, interpreter start included."""
    started = int(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")


def _parse(option: str, text: str, units: dict[str, int], suffix: str, allowed: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*" + suffix, text.strip(), re.IGNORECASE | re.ASCII)
    number = float(match[1]) * units[match[2].upper()] if match else 0.0
    if number < 1:
        raise UserError(f"{option} {text}: give {allowed}")
    if number >= 1 << 63:
        raise UserError(f"{option} {text}: that is beyond 64 bits; give {allowed}")
    return int(number)


def free_memory() -> int:
    """Bytes that can be used without swapping or being killed: the machine's free memory or less in a container."""
    free = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")]
    try:
        facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = [int(facts["MemAvailable"].split()[0]) << 10]
    except (OSError, KeyError):
        pass  # not Linux: free pages alone are a safe answer
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        if limit != "max":
            used = int((_CGROUP / "memory.current").read_text())
            cache = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
            free.append(int(limit) - used + int(cache.get("inactive_file", 0)))
    except (OSError, ValueError):
        pass  # no control groups, or only their first version
    return max(min(free), 64 << 20)


def use_thrifty_allocator() -> None:
    """Let Arrow allocate through jemalloc, or the C library where its build has none.

    Arrow's default, mimalloc, returns large blocks to the system at once and faults them in anew for every batch:
    measured in the shuffle, 2.0 s of system time per 100 M tokens against 0.4 s, and no less memory.
    """
    import pyarrow as pa

    try:
        pa.set_memory_pool(pa.jemalloc_memory_pool())
    except NotImplementedError:
        pa.set_memory_pool(pa.system_memory_pool())


def require_disk(folder: Path, needed: int, purpose: str, *, option: str = "") -> None:
    """Check that the disk of `folder`, which `option` named, has room for `needed` bytes.

    Raises:
        UserError: it has not; the message says how much is missing.
    """
    existing = folder
    while not existing.is_dir():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"{option}{folder}: {purpose} needs about {megabytes(needed)} of disk and {megabytes(free)} are free;"
            " free some, or write elsewhere"
        )


def require_package(package: str, needed_by: str, extra: str) -> None:
    """Import a package that not every installation has. Some greet with what their own parts miss, which nobody sees;
    bitsandbytes would run a kernel from the hub where the package `kernels` is installed, and does without here.

    Raises:
        UserError: it is not installed, or cannot be imported; `extra` of ours brings it.
    """
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()), _nothing_fetched():
            importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            f"{needed_by} needs {package} ({error}); install it with: pip install 'jllm[{extra}]'"
        ) from None


@contextlib.contextmanager
def _nothing_fetched() -> Iterator[None]:
    """Inside it the package that fetches code from the hub cannot be imported, unless it has been before."""
    known = "kernels" in sys.modules
    if not known:
        sys.modules["kernels"] = None  # type: ignore[assignment]  # as Python's import system has it
    try:
        yield
    finally:
        if not known:
            del sys.modules["kernels"]


def megabytes(size: int) -> str:
    """A size for people."""
    return f"{size / 2**20:,.0f} MiB"
