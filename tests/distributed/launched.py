"""Commands that tests launch as a user does, each in a session of its own."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
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
