"""A file that grows while a run goes on, and that a full disk does not end.

What cannot be written is kept in memory and written, in order and without gaps, when there is room again; one warning
says so. A run killed meanwhile leaves the file as far as it was written, perhaps in the middle of an entry.
Cost: one write a call, nothing is flushed to disk; what waits for room takes its size in memory.
"""

import os
from collections.abc import Callable
from pathlib import Path

from jllm import atomic


class AppendedFile:
    """Appends bytes to a file.

    Args:
        path: is made where it is missing.
        warn: is told once each time that writing begins to fail.

    Raises:
        OSError: the file cannot be opened; later failures are warnings.
    """

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self._path, self._warn = path, warn
        self._descriptor = atomic.open_in_place(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._waiting = bytearray()
        self._fails = False

    def append(self, data: bytes) -> None:
        """Write `data` after all that was given before."""
        self._waiting += data
        try:
            while self._waiting:
                # A write may take a part of it: the last free bytes of a disk.
                written = os.write(self._descriptor, self._waiting)
                del self._waiting[:written]
        except OSError as error:
            if not self._fails:
                self._fails = True  # before the warning, which may itself be recorded here
                reason = os.strerror(error.errno) if error.errno else str(error)
                self._warn(f"{self._path}: {reason}; what is recorded is kept and written when that works again")
            return
        self._fails = False

    def close(self) -> None:
        """Try once more what waits, and close the file."""
        self.append(b"")
        try:
            os.close(self._descriptor)
        except OSError as error:  # some file systems say only now that a disk is full
            self._warn(f"{self._path}: {os.strerror(error.errno or 0)}; the last records may be missing")
