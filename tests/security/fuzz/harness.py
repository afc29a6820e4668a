"""Runs of a target: a changed file, the real reader, and what may come of it.

Success and `UserError` are allowed. Another exception is a finding, and so are a run above `MOST_SECONDS` and memory
that grows by more than `MOST_BYTES`; a forked child, whose memory is limited, does the runs. A run depends on seed,
target and number alone: what the report prints repeats it.
"""

import contextlib
import dataclasses
import io
import itertools
import multiprocessing
import random
import resource
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jllm.errors import UserError

MOST_SECONDS, MOST_BYTES = 30, 1 << 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A reader under test.

    Attributes:
        name: of the target.
        change: writes a changed file, or several, into an empty folder.
        read: reads them, as commands do.
    """

    name: str
    change: Callable[[Path, random.Random], None]
    read: Callable[[Path], Any]


def run_once(target: Target, seed: int, number: int, folder: Path) -> str | None:
    """One run; what is wrong with it, or None."""
    rng = random.Random(f"{seed} {target.name} {number}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    target.change(folder, rng)
    begin = time.process_time()
    signal.alarm(4 * MOST_SECONDS)  # by the clock, whatever else the machine does
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            target.read(folder)
    except UserError as error:
        if len(str(error).splitlines()) != 1:
            return f"a mistake of several lines: {error}"
    except BaseException as error:  # whatever it is: that is what is looked for
        return f"{type(error).__name__}: {error}"[:300] + "\n" + traceback.format_exc(limit=-6)
    finally:
        signal.alarm(0)
    seconds = time.process_time() - begin
    return f"took {seconds:.0f} s" if seconds > MOST_SECONDS else None


def _work(target: Target, seed: int, first: int, seconds: float, most: int, results: Any) -> None:
    """The child: runs until the time is over."""
    signal.signal(signal.SIGALRM, _too_long)
    limit_memory(MOST_BYTES)
    until = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="jllm-fuzz-") as folder:
        for number in itertools.islice(itertools.count(first), most):
            results.send(("begin", number, None))
            problem = run_once(target, seed, number, Path(folder, "run"))
            if problem is not None:
                results.send(("found", number, problem))
            if time.monotonic() > until:
                break
        results.send(("end", number + 1 - first, None))


def _too_long(*_: object) -> None:
    raise TimeoutError(f"more than {4 * MOST_SECONDS} s")


def limit_memory(more: int) -> None:
    """Let this process have that much more memory than it has."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, resource.RLIM_INFINITY))


def run_target(
    target: Target, seed: int, seconds: float, *, first: int = 0, most: int = 1 << 40
) -> tuple[int, list[str]]:
    """Runs of a target for so many seconds, or so many: how many there were, and what was found, with its number."""
    receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_work, args=(target, seed, first, seconds, most, sender))
    child.start()
    sender.close()
    found: list[str] = []
    runs, last = 0, first
    with contextlib.suppress(EOFError):
        while True:
            what, number, problem = receiver.recv()
            if what == "begin":
                runs, last = runs + 1, number
            elif what == "found":
                found.append(f"{target.name} --seed {seed} --first {number}: {problem}")
            else:
                break
    child.join()
    if child.exitcode:
        found.append(f"{target.name} --seed {seed} --first {last}: the process ended with {child.exitcode}")
    return runs, found
