"""A chunk: consecutive whole records of one source, what one worker is given at a time.

Cost: a chunk of a plain local file may be planned without its bytes, which are read where they are needed.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from jllm.data.sources import text
from jllm.data.sources.streams import read_exactly
from jllm.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk:
    """Consecutive whole records of one source.

    Attributes:
        source: index of the source.
        index: number of the chunk in the source.
        line: line (row, element) number of its first record, from 1.
        data: the bytes, a list of JSON elements' bytes, or an Arrow table; or of bytes in `file` the number alone.
        end: where the next chunk starts: decompressed bytes, or rows.
        end_line: line number there; 0 where nobody has counted lines yet, and `line` is not known.
        file: a local file in which the bytes stand before `end`.
    """

    source: int
    index: int
    line: int
    data: Any
    end: int
    end_line: int
    file: str | None = None

    @property
    def is_counted(self) -> bool:
        return self.end_line > 0

    @property
    def content(self) -> Any:
        """`data`, read where only its length is there.

        Raises:
            UserError: it is no longer there.
        """
        return next(self.stretches(max(1, self.data))) if isinstance(self.data, int) else self.data

    def stretches(self, size: int) -> Iterator[bytes]:
        """The bytes of a chunk that came without them, as many as `size` at a time.

        Raises:
            UserError: they are no longer there.
        """
        assert self.file is not None
        left: int = self.data
        try:
            with open(self.file, "rb", buffering=0) as stream:
                stream.seek(self.end - left)
                while True:
                    found = read_exactly(stream, min(size, left), at_once=size)
                    if len(found) < min(size, left):
                        break
                    yield found
                    left -= len(found)
                    if not left:
                        return
        except OSError as error:
            raise UserError(f"-i {self.file}: cannot be read: {error.strerror or error}") from None
        raise UserError(f"-i {self.file}: became shorter while it was read; leave it as it is during a run")


def first_records(chunk: Chunk, kind: str, count: int) -> Chunk:
    """The first `count` records of a chunk of a source of this kind, or the chunk itself where it has no more.

    Lines are counted where records are lines, blank ones too. `Chunk.end` of what is cut is not known.
    """
    data = chunk.content
    if isinstance(data, bytes):
        line = count + 1
        if kind == "text":
            lines = text.parse(data, 1).lines
            line = lines[count] if len(lines) > count else 0
        parts = data.split(b"\n", line - 1) if line else []
        if len(parts) < line or not parts or not parts[-1].strip():
            return chunk
        cut: Any = data[: len(data) - len(parts[-1])]
    elif len(data) <= count:
        return chunk
    else:
        cut = data[:count] if isinstance(data, list) else data.slice(0, count)
    return dataclasses.replace(chunk, data=cut, file=None)


def size_of(chunk: Chunk) -> int:
    """The size of a chunk: decompressed bytes, or rows."""
    data = chunk.content
    if isinstance(data, list):
        return sum(len(element) + 1 for element in data)
    return len(data)
