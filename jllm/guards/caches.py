"""What commands keep for later ones in the user's cache folder, and when it is not believed.

An entry is a file of two lines of JSON: the SHA-256 of its name and its content, and the content. The name is a hash
of all that the content was made from, so an entry that was edited, cut short, emptied or renamed is found out, and made
anew. Against other users stands that folders and entries belong to this one, and that nobody else may write there;
what is not so is left alone, with one line.

Guarantees: a cache that cannot be read, written to or believed costs time and nothing else. Two processes may write one
entry at once: each reader sees the whole of one.
Cost: a hash over an entry.
"""

import contextlib
import hashlib
import json
import os
import stat
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from jllm.errors import say

VARIABLE = "XDG_CACHE_HOME"
MOST_ENTRIES = 16
LARGEST_ENTRY = 512 << 20
SUFFIX = ".jsonl"
_STALE_SECONDS = 3600.0
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH

_told: set[str] = set()
"""What this process has said of places that are not believed."""


def place(name: str) -> Path | None:
    """Where things of this kind are kept: `jllm/<name>` in the user's cache folder, there or not.

    As the XDG specification has it, `XDG_CACHE_HOME` counts where it is an absolute path. None where the user has no
    home either.
    """
    given = os.environ.get(VARIABLE, "")
    try:
        root = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
    except RuntimeError:
        return None
    return root / "jllm" / name if root.is_absolute() else None


def is_ours(folder: Path) -> bool:
    """Whether a cache's folder, and the `jllm` above it, belong to this user alone; one line where they do not.

    False also where there is no such folder.
    """
    return all(_is_private(each, stat.S_ISDIR) for each in (folder.parent, folder))


def make(folder: Path) -> bool:
    """Make a cache's folder, for this user alone, where it is missing; whether it is there and ours."""
    try:
        folder.parent.parent.mkdir(parents=True, exist_ok=True)
        for each in (folder.parent, folder):
            each.mkdir(mode=0o700, exist_ok=True)
    except OSError:
        return False
    return is_ours(folder)


def private_folder(name: str) -> Path:
    """A cache's folder that can be written to: `place(name)`, or one of this user's among the temporary files.

    Raises:
        OSError: neither can be made.
    """
    beside = Path(tempfile.gettempdir()) / f"jllm-{os.geteuid()}" / name
    for folder in (place(name), beside):
        if folder is not None and make(folder) and _can_be_written_to(folder):
            return folder
    return Path(tempfile.mkdtemp(prefix="jllm-"))


def read(entry: Path) -> bytes | None:
    """The content of an entry, as `write` was given it; None where there is none that can be believed."""
    try:
        if not is_ours(entry.parent) or not _is_private(entry, stat.S_ISREG):
            return None
        descriptor = os.open(entry, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            if os.fstat(descriptor).st_size > LARGEST_ENTRY:
                return None
            head, _, content = file.read().partition(b"\n")
        if head != _head(entry, content):
            return None
        with contextlib.suppress(OSError):  # as where the disk is read-only
            os.utime(entry)  # the oldest are removed first
    except (OSError, ValueError):
        return None
    return content


def write(entry: Path, content: bytes) -> None:
    """Keep an entry, and the newest of those beside it; where that cannot be, nothing is kept and nothing is said."""
    with contextlib.suppress(OSError, ValueError):
        if len(content) > LARGEST_ENTRY or not make(entry.parent):
            return
        descriptor, temporary = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=entry.parent)  # nobody else's, and new
        try:
            with open(descriptor, "wb") as file:
                file.write(_head(entry, content) + b"\n" + content)
            os.replace(temporary, entry)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        _remove_old(entry.parent)


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _head(entry: Path, content: bytes) -> bytes:
    sums = hashlib.sha256(entry.name.encode() + b"\n" + content)
    return json.dumps({"sha256": sums.hexdigest()}).encode()


def _remove_old(folder: Path) -> None:
    found = sorted(folder.glob("*.json*"), key=_age)
    left_over = [path for path in folder.glob(".*.tmp") if _age(path) < time.time() - _STALE_SECONDS]
    for path in found[:-MOST_ENTRIES] + left_over:
        path.unlink(missing_ok=True)


def _age(path: Path) -> float:
    """When it was last used; one that another process has just removed is the oldest."""
    try:
        return path.lstat().st_mtime
    except OSError:
        return 0.0


def _can_be_written_to(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1 << 16))  # a full disk makes files, and fills none
    except OSError:
        return False
    return True


def _is_private(path: Path, kind: Callable[[int], bool]) -> bool:
    """Whether this user alone can have written it, and it is what it should be; a link has to be theirs too."""
    try:
        found = [path.lstat(), path.stat()]
    except OSError:
        return False
    who = os.geteuid()
    if any(each.st_uid != who for each in found):
        _tell_once(path, "belongs to another user", "remove it")
    elif found[1].st_mode & _OTHERS_MAY_WRITE:
        _tell_once(path, "others may write there", f"chmod -R go-w {path}")
    else:
        return kind(found[1].st_mode)
    return False


def _tell_once(path: Path, reason: str, advice: str) -> None:
    line = f"note: the cache {path} is not used: {reason}; {advice}, or set {VARIABLE} to a folder of your own"
    if line not in _told and os.environ.get("LOCAL_RANK", "0") == "0":
        say(line, file=sys.stderr)
    _told.add(line)
