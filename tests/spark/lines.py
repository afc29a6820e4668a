"""Command lines of both the local commands and the Spark jobs, run in this process, and what came of them."""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from jllm.data.dataset.manifest import MANIFEST_NAME


@dataclasses.dataclass(frozen=True)
class End:
    """How a command line ended."""

    code: int
    out: str
    err: str

    @property
    def mistake(self) -> str:
        """The error line, "" where there is none; the last line, whatever else was said."""
        lines = self.err.splitlines()
        found = [line for line in lines if line.startswith("error: ")]
        assert len(found) == (1 if self.code else 0), self.err
        assert not found or lines[-1] == found[0], self.err
        assert "Traceback" not in self.err + self.out
        return found[0] if found else ""


def run_line(command: click.Command, words: Sequence[str]) -> End:
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            command.main(list(words))
        except SystemExit as end:
            code = int(end.code or 0)
    return End(code, out.getvalue(), err.getvalue())


def contents(folder: Path) -> dict[str, str]:
    """Every file, link and folder below a folder, by what is in it."""
    return {os.fsencode(path.relative_to(folder)).decode(errors="replace"): _content(path) for path in _all(folder)}


def _all(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            yield Path(parent, name)


def _content(path: Path) -> str:
    if path.is_symlink():
        return f"-> {os.readlink(path)}"
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return "folder" if path.is_dir() else "other"


def found(folder: Path) -> dict[str, Any] | None:
    """What a manifest says that the local command and the Spark job must agree about; None where there is none."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return None
    value = json.loads(path.read_text(encoding="utf-8"))
    names = ("rows", "tokens", "trained_tokens", "longest_row", "documents", "document_tokens", "longest_document")
    facts = {name: value[name] for name in names}
    return {**facts, "bad": value["bad_records"], "chat": value.get("chat"), "end": value.get("document_end")}
