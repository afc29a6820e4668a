"""Files that are there completely or not at all.

A file is written beside its final name, flushed to disk and renamed, so a command killed at any moment leaves the old
state or the new one. Temporary names start with a dot and end in `.tmp`: readers of data sets skip them, and they
are a function of the final name, so that the next run of the same command overwrites what a killed one left.

Cost: one fsync of the file and one of its folder for each file written.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TEMPORARY_SUFFIX = ".tmp"


def temporary_name(path: Path) -> Path:
    """Where `path` is written before it gets its name: `.<name>.tmp` in the same folder."""
    return path.with_name(f".{path.name}{TEMPORARY_SUFFIX}")


def sync_file(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to; when the block ends well it becomes `path`, otherwise it is removed."""
    temporary = temporary_name(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        sync_file(temporary)
        os.replace(temporary, path)
        sync_file(path.parent)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise


def write_text(path: Path, text: str) -> None:
    """Write a whole text file (UTF-8) atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically: indented, in the order of its keys' insertion, ending in a newline."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def remove_temporaries(folder: Path) -> None:
    """Remove the temporary files that a killed run left directly in `folder`."""
    for path in folder.glob(f".*{TEMPORARY_SUFFIX}"):
        if path.is_file():
            path.unlink()
