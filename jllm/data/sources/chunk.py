"""A chunk: consecutive whole records of one source, what one worker is given at a time.

Cost: a chunk of a plain local file goes to another process without its bytes, which are read there again.
"""

import dataclasses
from typing import Any

from jllm.data.sources.streams import read_exactly
from jllm.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk:
    """Consecutive whole records of one source.

    Attributes:
        source: index of the source.
        index: number of the chunk in the source.
        line: line (row, element) number of its first record, from 1.
        data: the bytes, a list of JSON elements' bytes, or an Arrow table.
        end: where the next chunk starts: decompressed bytes, or rows.
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
                found = read_exactly(stream, self.data)
        except OSError as error:
            raise UserError(f"-i {self.file}: cannot be read: {error.strerror or error}") from None
        if len(found) < self.data:
            raise UserError(f"-i {self.file}: became shorter while it was read; leave it as it is during a run")
        return found
