"""Files and folders that commands stumble over, for tests: damaged, shut, linked in circles, oddly called."""

import bz2
import contextlib
import ctypes
import gzip
import lzma
import os
import resource
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import zstandard

Make = Callable[[Path], object]
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def write(place: str, data: bytes | str) -> Make:
    content = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    return lambda folder: written(folder / place, content)


def written(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def link(place: str, target: str) -> Make:
    def make(folder: Path) -> None:
        path = folder / place
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target)

    return make


def mode(place: str, mode: int, *, is_folder: bool) -> Make:
    def make(folder: Path) -> None:
        path = folder / place
        if is_folder:
            path.mkdir(parents=True, exist_ok=True)
        elif not path.exists():
            written(path, b'{"text": "a"}\n')
        path.chmod(mode)

    return make


def folder_at(place: str) -> Make:
    def make(folder: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            (folder / place).unlink()
        (folder / place).mkdir(parents=True)

    return make


def socket_among(folder: Path) -> None:
    here = os.getcwd()
    os.chdir(folder / "in")  # the names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind("s.jsonl")
    finally:
        os.chdir(here)


def of_name(name: bytes) -> Make:
    return lambda folder: written(Path(os.fsdecode(os.path.join(os.fsencode(folder / "in"), name))), b'{"text": "a"}\n')


DAMAGED_JSON = {
    "no JSON": b"{",
    "a list": b"[]",
    "a number": b"1e999",
    "null": b"null",
    "an empty object": b"{}",
    "UTF-16": "{}".encode("utf-16"),
    "deep": b"[" * 100_000,
    "empty": b"",
}


@contextlib.contextmanager
def bare_root() -> Iterator[None]:
    """For this thread and those that it starts, root may read and write no more than anyone else."""
    library = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    before, after = (ctypes.c_uint32 * 6)(), (ctypes.c_uint32 * 6)()
    if os.geteuid() != 0 or library.capget(header, before):
        yield
        return
    ctypes.memmove(after, before, ctypes.sizeof(before))
    after[0] &= ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, of what is in effect
    library.capset(header, after)
    try:
        yield
    finally:
        library.capset(header, before)


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """No file that this process writes grows beyond so many bytes, as on a disk that is full; the error names none."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
