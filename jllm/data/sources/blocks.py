"""A source in blocks: consecutive whole records, about 4 MiB of them, cut without parsing them.

A record may have any size, a block can be parsed and encoded on any thread, and reading can start again at any block.

Guarantees: the blocks of a source are a function of its content alone.
Cost: one pass over the bytes; memory for one block, or one record where that is larger.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from jllm.data.sources.inputs import STDIN, Source, safe, without_password
from jllm.data.sources.streams import open_source, reading_errors
from jllm.errors import UserError

BLOCK_BYTES = 4 << 20
_BLANK = b" \t\r\f\v"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """Consecutive whole records of one source.

    Attributes:
        source: index of the source.
        index: number of the block in the source.
        line: line (row, element) number of its first record, from 1.
        data: the bytes, a list of JSON elements' bytes, or an Arrow table.
        end: where the next block starts: decompressed bytes, or rows.
        end_line: line number there.
        file: a local file in which the bytes stand before `end`: another process reads them there, which costs
            less than sending them. None: they are sent.
    """

    source: int
    index: int
    line: int
    data: Any
    end: int
    end_line: int
    file: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ if self.file is None else {**self.__dict__, "data": len(self.data)}

    @property
    def content(self) -> Any:
        """`data`, read again where this process was sent its length alone.

        Raises:
            UserError: it is no longer there.
        """
        if not isinstance(self.data, int):
            return self.data
        assert self.file is not None
        try:
            with open(self.file, "rb", buffering=0) as stream:
                stream.seek(self.end - self.data)
                found = _read_exactly(stream, self.data)
        except OSError as error:
            raise UserError(f"-i {self.file}: cannot be read: {error.strerror or error}") from None
        if len(found) < self.data:
            raise UserError(f"-i {self.file}: became shorter while it was read; leave it as it is during a run")
        return found


def read_blocks(
    source: Source, number: int, *, start: int = 0, line: int = 1, index: int = 0, columns: Sequence[str] | None = None
) -> Iterator[Block]:
    """The blocks of a source, from where an earlier block ended (`Block.end`, `Block.end_line`).

    Args:
        number: the source's index, put into the blocks.
        start, line, index: where to start: byte (row), its line, and the number of the first block.
        columns: Parquet columns to read; None reads all.

    Raises:
        UserError: the source cannot be read: it is damaged, cut short, or not what its name says.
    """
    try:
        if source.kind in ("parquet", "ids"):
            from jllm.data.sources.tables import parquet_blocks

            columns = ("input_ids", "labels", "attention_mask") if source.kind == "ids" else columns
            yield from parquet_blocks(source, number, start, index, columns)
        else:
            yield from _byte_blocks(source, number, start, line, index)
    except reading_errors() as error:
        raise UserError(f"-i {without_password(source.path)}: cannot be read: {safe(error)}") from None


def line_ends(data: bytes) -> NDArray[np.int64]:
    """Where the newlines of `data` are. `bytes` looks at one byte at a time, four times as slow."""
    return np.flatnonzero(_is_newline(data))


def _is_newline(data: bytes) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = np.frombuffer(data, dtype=np.uint8) == ord("\n")
    return found


def _byte_blocks(source: Source, number: int, start: int, line: int, index: int) -> Iterator[Block]:
    stream = open_source(source)
    kind = source.kind
    is_plain = source.compression is None and source.path != STDIN and "://" not in source.path
    file = source.path if is_plain and Path(source.path).is_file() else None  # and no pipe, which is read once
    try:
        _skip(stream, start, seekable=source.compression is None and source.path != STDIN)
        held, position = b"", start
        if start == 0:
            held = _read_exactly(stream, 64)
            if held.startswith(b"\xef\xbb\xbf"):  # a byte order mark is no text
                held, position = held[3:], 3
        if kind == "json":
            from jllm.data.sources.tables import json_list_blocks

            if start or held.lstrip()[:1] == b"[":
                yield from json_list_blocks(stream, held, number, position, line, index)
                return
            kind = "jsonl"  # JSON lines under the name of .json
        searched, window = 0, BLOCK_BYTES
        while True:
            # Where no record ends in the window, it is doubled: the work stays in proportion to the record, and where a
            # block ends depends on where it starts and on nothing else.
            if len(held) < window:
                more = _read_exactly(stream, window - len(held))
                held = held + more if held else more
            at_end = len(held) < window
            cut = len(held) if at_end else _last_boundary(held, searched, window, kind)
            if cut:
                data, held, searched, window = held[:cut], held[cut:], 0, BLOCK_BYTES
                position += cut
                end_line = line + int(np.count_nonzero(_is_newline(data)))
                yield Block(
                    source=number, index=index, line=line, data=data, end=position, end_line=end_line, file=file
                )
                index, line = index + 1, end_line
            else:
                searched, window = window, 2 * window
            if at_end:
                return
    finally:
        if source.path != STDIN:
            stream.close()


def _read_exactly(stream: IO[bytes], size: int) -> bytes:
    pieces = []
    while size > 0:
        piece = stream.read(min(size, 64 << 20))
        if not piece:
            break
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def _skip(stream: IO[bytes], start: int, *, seekable: bool) -> None:
    if seekable:
        stream.seek(start)
        return
    left = start
    while left > 0:
        piece = stream.read(min(left, BLOCK_BYTES))
        if not piece:
            raise EOFError("it is shorter than it was in the run that is being resumed")
        left -= len(piece)


def _last_boundary(data: bytes, searched: int, window: int, kind: str) -> int:
    """The end of the last whole record in `data[:window]`; 0 where there is none, or none behind `searched`."""
    if kind == "jsonl":
        return data.rfind(b"\n", searched, window) + 1
    end = window
    while True:
        # The line that ends here, at `newline`, is blank when there is only white space back to the newline before it.
        newline = data.rfind(b"\n", max(0, searched - 4096), end)
        if newline < 0:
            return 0
        before = data.rfind(b"\n", 0, newline)
        if not data[before + 1 : newline].strip(_BLANK):
            return newline + 1
        end = newline
