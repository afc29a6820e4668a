"""The lines of the pages that make or change data sets, run inside this process or in one that can be killed."""

import contextlib
import dataclasses
import io
import os
import re
import signal
import subprocess
from pathlib import Path

from jllm.options import Command
from tests.forks import context
from tests.pages.blocks import COMMANDS, FILE, PAGES, Block, blocks_of
from tests.pages.inputs import lay_out
from tests.pages.parsers import command_of, split

WRITING = ("raw2ids", "shuffle_datasets", "shuffle_partition", "repartition", "manifest")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """A command of a page.

    Attributes:
        words: of it, from the command's name on, as `jllm` takes them.
    """

    block: Block
    command: Command
    words: tuple[str, ...]

    @property
    def output(self) -> str:
        """The folder that it makes or changes, as the line names it."""
        for flag in ("-o", "--output"):
            if flag in self.words:
                return self.words[self.words.index(flag) + 1]
        if "-d" in self.words:
            folder = self.words[self.words.index("-d") + 1]
            return folder if self.command.name == "repartition" else f"{folder}-sf"
        return self.words[0]

    def has(self, flag: str) -> bool:
        """Whether the command knows a flag."""
        return any(flag in parameter.opts for parameter in self.command.params)

    def __str__(self) -> str:
        return f"{self.block} {self.command.name}"


def data_lines(page: Path) -> list[Line]:
    """The lines of a page that make or change data sets, in order."""
    lines = []
    for block in blocks_of(page):
        if block.kind != COMMANDS or block.only_parsed:
            continue
        for command in block.commands:
            words = split(command)
            if not words or words[0] not in ("jllm", "python") or (found := command_of(words)) is None:
                continue
            if found[0].name in WRITING and "--dry_run" not in words:
                lines.append(Line(block=block, command=found[0], words=tuple(found[1])))
    return lines


PAGES_WITH_LINES = [page for page in PAGES if data_lines(page)]


def lay_out_page(page: Path, folder: Path) -> None:
    """What the page's lines are given: data, models, and the files that the page shows."""
    folder.mkdir()
    blocks = blocks_of(page)
    lay_out(folder, "\n".join(block.text for block in blocks))
    for block in blocks:
        if block.kind == FILE:
            (folder / block.file_name).write_text(block.tried, encoding="utf-8")


def run_here(line: Line, folder: Path, *more: str) -> "subprocess.CompletedProcess[str]":
    """A line in this process, with `folder` as the working folder; `more` are further words."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    words = [*line.words, *more]
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            line.command.main(words)
        except SystemExit as end:
            code = int(end.code or 0)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def _work(name: str, words: tuple[str, ...], folder: str) -> None:
    os.setsid()
    found = command_of(["jllm", name.removesuffix("_datasets").replace("_", "-"), *words])
    assert found is not None
    os.chdir(folder)
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        found[0].main(list(words))


def start(line: Line, folder: Path) -> "context.Process":
    """A line in a process of its own, which leads a session, so that all it starts can be killed with it."""
    process = context.Process(target=_work, args=(line.command.name, line.words, str(folder)))
    process.start()
    return process


def end(process: "context.Process") -> None:
    """Kill a line that `start` started, with all that it started."""
    with contextlib.suppress(ProcessLookupError):  # it has not come so far as to lead a session
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def mistakes(err: str) -> list[str]:
    """The lines that say what a user did wrong."""
    return [text for text in err.splitlines() if re.match(r"error: ", text)]
