"""Files that are there completely or not at all; and folders, of which nothing is passed over unseen.

A file is written beside its final name, flushed to disk and renamed, so a command killed at any moment leaves the old
state or the new one. Temporary names start with a dot and end in `.tmp`: readers of data sets skip them, and they
are a function of the final name, so that the next run of the same command overwrites what a killed one left.

Guarantees: what a file system refuses is raised with the path of the file in question.
Cost: one fsync of the file and one of its folder for each file written.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jllm.errors import UserError
from jllm.guards import notation

TEMPORARY_SUFFIX = ".tmp"
_CUT_SHORT = re.compile(r"\d+ requested and \d+ written")
"""What numpy says of an array that it could not write to its end, without the reason."""
_FULL_BELOW = 1 << 20
"""Bytes that are left of a disk that is full: a block may be, of which no file gets a part."""


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


def create(path: Path) -> None:
    """Make an empty file of a temporary name, that of this process alone: what lies there, a link too, goes first.

    Raises:
        OSError: a folder has that name, or somebody made another file of it at this very moment.
    """
    with contextlib.suppress(FileNotFoundError):
        path.unlink()  # of a link, the link
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666))


def open_in_place(path: Path, flags: int, *, mode: int = 0o666) -> int:
    """Open a file of ours that is written in place (a lock, records that grow): a descriptor, never of a link's target.

    A link to a device or a pipe is followed: nothing that lies there is lost.

    Raises:
        UserError: the name is a link to a file, or to nothing.
    """
    try:
        return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    except OSError as error:
        if error.errno == errno.ELOOP and path.is_symlink():
            if path.exists() and not path.is_file() and not path.is_dir():
                return os.open(path, flags | os.O_CLOEXEC, mode)
            raise UserError(f"{path}: is a link, which is not written through; remove it") from None
        raise


def remove_tree(folder: Path, *, missing_ok: bool = False) -> None:
    """Remove a folder of ours with all in it; of a link, or of anything else of that name, only the name.

    Raises:
        OSError: it cannot be removed.
    """
    if folder.is_symlink() or not folder.is_dir():
        folder.unlink(missing_ok=missing_ok)
    else:
        shutil.rmtree(folder)


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a path below `folder` stays there: no folder between the two is a link."""
    between = [parent for parent in path.parents if parent != folder and parent.is_relative_to(folder)]
    return not any(parent.is_symlink() for parent in between)


def plain_name(name: object) -> str | None:
    """Why a name from a file cannot be one of a file in the folder beside it; None where it can.

    It has to be relative, in plain parts with forward slashes, and leads nowhere else.
    """
    if not isinstance(name, str):
        return f"{name!r} is not a name"
    if not name or "\0" in name:
        return f"{name!r} is not the name of a file"
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return f"{name!r} is not the name of a file"
    if name.startswith(("/", "\\")) or re.match("[A-Za-z]:[/\\\\]", name):
        return f"{name!r} is absolute, and not a name within the folder"
    parts = name.split("/")
    if ".." in parts:
        return f"{name!r} leads out of the folder"
    if "" in parts or "." in parts:
        return f"{name!r} is not a plain name within the folder"
    return None


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """What a file system refuses in the block without a name, as a full disk in the middle of a file, is raised with
    this one."""
    try:
        yield
    except OSError as error:
        if _CUT_SHORT.search(str(error)):
            free = shutil.disk_usage(path.parent).free
            reason = errno.EIO if free > _FULL_BELOW else errno.ENOSPC
            raise OSError(reason, os.strerror(reason), str(path)) from error
        # One without a number is no file system's, and with a path Python would show the path alone.
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary file to write to; when the block ends well it becomes `path`, otherwise it is removed.

    It is made anew, so that nothing is written through a link that was laid there.
    """
    temporary = temporary_name(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with naming(path):
            create(temporary)
            yield temporary
            sync_file(temporary)
            os.replace(temporary, path)
            sync_file(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def check_new_folder(folder: Path, option: str) -> None:
    """Raises:
    UserError: `option` names a place where something is already.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(f"{option} {folder}: is there already, and is no folder; give a new folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{option} {folder}: is not empty; give a new folder")


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Give a temporary folder to fill; when the block ends well it becomes `folder`, otherwise it is removed.

    What a killed command left in it goes first. Only one command at a time fills it.

    Raises:
        UserError: another command is at it.
        OSError: `folder` is there and not empty.
    """
    temporary = temporary_name(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if temporary.is_symlink():
        temporary.unlink()
    temporary.mkdir(exist_ok=True)
    descriptor = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        _lock_folder(descriptor, folder)
        try:
            with naming(folder):
                for path in temporary.iterdir():
                    remove_tree(path)
                yield temporary
                for place, _, files in walk(temporary):
                    for name in files:
                        sync_file(place / name)
                    sync_file(place)
                os.replace(temporary, folder)
                sync_file(folder.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                remove_tree(temporary)
            raise
    finally:
        os.close(descriptor)


def _lock_folder(descriptor: int, folder: Path) -> None:
    """Raises:
    UserError: another command holds the folder, or finished it just now.
    """
    is_free = True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        is_free = False
    except OSError:  # a file system without locks
        pass
    temporary = temporary_name(folder)
    if not is_free or not temporary.exists() or not os.path.samestat(os.fstat(descriptor), os.stat(temporary)):
        raise UserError(f"{folder}: another command is writing it; wait for that one, or give another folder")


def write_text(path: Path, text: str) -> None:
    """Write a whole text file (UTF-8) atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically: indented, in the order of its keys' insertion, ending in a newline."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_object(path: Path, advice: str) -> dict[str, Any] | None:
    """The object in a JSON file of ours; None where there is no such file.

    Args:
        advice: what to do where it holds something else.

    Raises:
        UserError: it does, or cannot be read.
    """
    try:
        value = notation.read_json(path)
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); {advice}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a JSON {type(value).__name__} and no object; {advice}")
    return value


def walk(folder: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """`os.walk` over a folder and all below it, sorted, which follows links and raises where a folder cannot be read.

    Names may be taken out of the list of folders, which are then not looked into. A link that leads back to a folder
    above it is passed over: everything there is found without it.
    """
    pending = [(folder, frozenset[tuple[int, int]]())]
    while pending:
        place, above = pending.pop()
        facts = os.stat(place)
        if (facts.st_dev, facts.st_ino) in above:
            continue
        folders: list[str] = []
        files: list[str] = []
        with os.scandir(place) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                (folders if _is_folder(entry) else files).append(entry.name)
        yield place, folders, files
        inside = above | {(facts.st_dev, facts.st_ino)}
        pending += [(place / name, inside) for name in reversed(folders)]


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself: whoever needs the file finds out
        return False


def remove_temporaries(folder: Path) -> None:
    """Remove the temporary files that a killed run left directly in `folder`."""
    for path in folder.glob(f".*{TEMPORARY_SUFFIX}"):
        if path.is_symlink() or path.is_file():
            path.unlink()
