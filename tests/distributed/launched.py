"""Commands that tests launch as a user does, each in a session of its own."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path


class Run(subprocess.Popen[bytes]):
    """A command in a session of its own, its output in a file: a pipe that nobody reads would stop it when full."""

    def __init__(self, command: list[str], folder: Path, *, environment: Mapping[str, str] | None = None) -> None:
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process
        super().__init__(
            command,
            cwd=folder,
            env={
                **os.environ,
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "OMP_NUM_THREADS": "1",
                **(environment or {}),
            },
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # A shell starts background jobs with SIGINT ignored, and what is ignored stays so in all their children.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    def output(self, timeout: float) -> str:
        """All it wrote, once it has ended."""
        self.wait(timeout)
        self._output.seek(0)
        return self._output.read().decode()


def end_group(run: Run) -> None:
    """Whatever a run that did not end in time has started, compilers included."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(run.pid, signal.SIGKILL)


def rank_processes(marker: str) -> list[int]:
    """Ranks whose command line has `marker`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if "jllm.train_pipe" in command and marker in command:
            found.append(int(path.parent.name))
    return found


def is_launcher(process: int) -> bool:
    return b"deepspeed.launcher" in Path(f"/proc/{process}/cmdline").read_bytes()


def wait_until(condition: Callable[[], object], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.2)
    return False
