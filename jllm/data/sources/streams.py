"""The bytes of a source, decompressed.

Guarantees: a file that was cut short or is damaged raises one of `reading_errors`; it is never taken for a shorter one.
Memory for a buffer, however much the file becomes: at most some MB are decompressed at once.
"""

import bz2
import gzip
import io
import lzma
import sys
import zlib
from typing import IO, Any

from jllm.data.sources.inputs import STDIN, Source, without_password
from jllm.errors import UserError


def open_source(source: Source) -> IO[bytes]:
    """The decompressed bytes of a source.

    Raises:
        UserError: it cannot be opened.
    """
    return _decompressed(_open_raw(source), source.compression)


def _open_raw(source: Source) -> Any:
    raw: Any
    try:
        if source.path == STDIN:
            raw = sys.stdin.buffer
        elif "://" in source.path:
            import fsspec

            raw = fsspec.open(source.path, "rb").open()
        else:
            raw = open(source.path, "rb", buffering=0)  # noqa: SIM115 - the caller closes it
    except OSError as error:
        raise UserError(f"-i {without_password(source.path)}: cannot be opened: {error.strerror or error}") from None
    return raw


def _decompressed(raw: Any, compression: str | None) -> IO[bytes]:
    if compression == "gzip":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw))  # type: ignore[arg-type, return-value]
    if compression == "bz2":
        return bz2.BZ2File(raw)
    if compression == "xz":
        return io.BufferedReader(_XzFile(raw))  # type: ignore[return-value]
    if compression == "zstd":
        return io.BufferedReader(_ZstdFile(raw))  # type: ignore[return-value]
    return raw  # type: ignore[no-any-return]


def expansion(source: Source) -> float | None:
    """About how many decompressed bytes a source has, by how its begin compresses; None where that is unknown."""
    if source.size is None or source.compression is None:
        return source.size
    raw = _open_raw(source)
    try:
        found = len(read_exactly(_decompressed(raw, source.compression), _ESTIMATED_FROM))
        read: int = raw.tell()
        return found * max(1.0, source.size / max(1, read))
    finally:
        raw.close()


_FED_AT_ONCE = 512
"""Bytes given to zstd at once, which may become 16 MiB: 4 of them are a block of 128 KiB. More are no faster."""
_XZ_MEMORY = 512 << 20
"""What an xz file may need: 65 MiB is what the highest level of xz makes files of."""


class _XzFile(io.RawIOBase):
    """Decompresses streams one after another, in memory that is bounded, whatever the file says it needs."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw
        self._stream = self._begun()
        self._data = b""

    @staticmethod
    def _begun() -> lzma.LZMADecompressor:
        return lzma.LZMADecompressor(memlimit=_XZ_MEMORY)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if self._stream.eof:
                self._data = self._stream.unused_data.lstrip(b"\0")
                while not self._data:  # zeros between streams
                    more = self._next()
                    if not more:
                        return 0
                    self._data = more.lstrip(b"\0")
                self._stream = self._begun()
            elif self._stream.needs_input and not self._data:
                self._data = self._next()
                if not self._data:
                    raise EOFError("the file ends inside an xz stream")
            found = self._stream.decompress(self._data, max_length=len(buffer))
            self._data = b""
            if found:
                buffer[: len(found)] = found
                return len(found)

    def _next(self) -> bytes:
        data: bytes = self._raw.read(1 << 16)
        return data

    def close(self) -> None:
        self._raw.close()
        super().close()


class _ZstdFile(io.RawIOBase):
    """Decompresses frames one after another, and unlike zstandard's own reader notices a file that was cut short."""

    def __init__(self, raw: Any) -> None:
        import zstandard

        self._raw = raw
        self._new = zstandard.ZstdDecompressor().decompressobj
        self._frame = self._new()
        self._fed = False
        self._read = memoryview(b"")
        self._held = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._held:
            if self._frame.eof:
                self._frame, self._fed = self._new(), False
            if not self._read:
                self._read = memoryview(self._raw.read(1 << 17))
            if not self._read:
                if self._fed:
                    raise EOFError("the file ends inside a zstd frame")
                return 0
            self._fed = True
            fed = self._read[:_FED_AT_ONCE]
            self._held = memoryview(self._frame.decompress(fed))
            self._read = self._read[len(fed) - (len(self._frame.unused_data) if self._frame.eof else 0) :]
        size = min(len(buffer), len(self._held))
        buffer[:size] = self._held[:size]
        self._held = self._held[size:]
        return size

    def close(self) -> None:
        self._raw.close()
        super().close()


def reading_errors() -> tuple[type[Exception], ...]:
    """What damaged or missing files raise; zstandard's error once that module is in use."""
    module = sys.modules.get("zstandard")
    known = (OSError, EOFError, lzma.LZMAError, zlib.error)
    arrow = sys.modules.get("pyarrow")
    return (*known, *((module.ZstdError,) if module else ()), *((arrow.ArrowException,) if arrow else ()))


_ESTIMATED_FROM = 4 << 20


def read_exactly(stream: IO[bytes], size: int, *, at_once: int = 64 << 20) -> bytes:
    """The next `size` bytes; fewer only where the stream ends.

    Args:
        at_once: bytes that are asked for at a time. What takes several is there twice while it is put together.
    """
    found = []
    while size > 0:
        data = stream.read(min(size, at_once))
        if not data:
            break
        found.append(data)
        size -= len(data)
    return b"".join(found)


def skip(stream: IO[bytes], start: int, *, seekable: bool) -> None:
    """Go to the byte `start` of a stream that stands at its beginning.

    Raises:
        EOFError: it ends before that.
    """
    if seekable:
        stream.seek(start)
        return
    left = start
    while left > 0:
        data = stream.read(min(left, 4 << 20))
        if not data:
            raise EOFError("it is shorter than it was in the run that is being resumed")
        left -= len(data)
