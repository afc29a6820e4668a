"""A person who types the lines of a page into a shell, from top to bottom, in a folder that has what the page names."""

import contextlib
import hashlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from jllm.parallel.ports import free_port
from tests.forks import context
from tests.pages.blocks import ROOT
from tests.pages.parsers import command_of, split
from tests.spark import quick_java

SECONDS = 240
DEAR_TO_START = ("adapter", "cat2hf", "convert", "extend_tokenizer", "merge", "plan")
"""Commands of ours whose imports take seconds, and nearly all of their time; those of `train` that only plan too."""


class Session:
    """A shell in `folder`, whose exported variables stay.

    Attributes:
        folder: where the commands run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._exports: list[str] = []
        programs = folder.with_name(f"{folder.name}.bin")
        programs.mkdir()
        # The launcher's own port is one for the whole machine, and other tests and runs may have it.
        launcher = Path(sys.executable).with_name("deepspeed")
        (programs / "deepspeed").write_text(f'#!/bin/sh\nexec "{launcher}" --master_port {free_port()} "$@"\n')
        (programs / "deepspeed").chmod(0o755)
        self._environment = {
            **os.environ,
            **quick_java.ENVIRONMENT,
            "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }

    def start(self, command: str) -> "subprocess.Popen[bytes]":
        """Start a command as the leader of a process group; output and errors go to files beside the folder."""
        script = "\n".join([*self._exports, command])
        with self._log("out").open("wb") as out, self._log("err").open("wb") as err:
            return subprocess.Popen(
                ["bash", "-e", "-c", script],
                cwd=self.folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    def run(self, command: str) -> "subprocess.CompletedProcess[str]":
        """Run a command to its end; whatever it leaves running after `SECONDS` is ended.

        One that is dear to start is run without a shell, in a process that has imported everything.
        """
        if is_dear_to_start(command):
            return self._run_forked(command)
        process = self.start(command)
        try:
            code = process.wait(SECONDS)
        finally:
            kill_group(process)
        if code == 0 and command.startswith("export "):
            self._exports.append(command)
        return subprocess.CompletedProcess(command, code, self._log("out").read_text(), self._log("err").read_text())

    def _run_forked(self, command: str) -> "subprocess.CompletedProcess[str]":
        words = split(command)
        process = context.Process(target=_run_words, args=(words, self.folder, self._log("out"), self._log("err")))
        process.start()
        process.join(SECONDS)
        code = process.exitcode
        process.kill()
        assert code is not None, f"{command}: not within {SECONDS} s"
        return subprocess.CompletedProcess(command, code, self._log("out").read_text(), self._log("err").read_text())

    def _log(self, what: str) -> Path:
        return self.folder.with_name(f"{self.folder.name}.{what}")


def is_dear_to_start(command: str) -> bool:
    """Whether a command is ours alone, with nothing that only a shell knows, and takes seconds to start."""
    words = split(command)
    if not command.startswith(("jllm ", "python -m jllm.")) or re.search(r"[|&;<>$*?`\\]", command):
        return False
    name = words[1] if words[0] == "jllm" else words[2].removeprefix("jllm.")
    return name in DEAR_TO_START or (name == "train" and "--dry_run" in words)


def _run_words(words: Sequence[str], folder: Path, out: Path, err: Path) -> None:
    os.chdir(folder)
    for path, stream in ((out, 1), (err, 2)):
        with path.open("wb") as file:
            os.dup2(file.fileno(), stream)
    found = command_of(words)
    assert found is not None
    sys.argv = list(words)
    found[0].main(found[1])


def kill_group(process: "subprocess.Popen[bytes]") -> None:
    """Kill a command and all that it started in its group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def checksums(folder: Path, *, but: Sequence[str] = ()) -> dict[str, str]:
    """Every file below a folder with a hash of its bytes, links not followed; `but` are names left out at the top."""
    found = {}
    for parent, folders, files in os.walk(folder):
        if Path(parent) == folder:
            folders[:] = [name for name in folders if name not in but]
        for name in files:
            path = Path(parent, name)
            if not path.is_symlink():
                found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found
