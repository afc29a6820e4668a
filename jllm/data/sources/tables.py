"""Sources that are not lines of bytes: Parquet files with a text or chat column, and JSON lists.

Parquet is read by row group and handed on in blocks of rows of about 4 MiB; a JSON list is cut into its elements
without parsing it as a whole, so that both run in bounded memory and a bad element costs only itself.

Cost: a JSON list is scanned at about 100 MB/s before its elements are parsed; use JSON lines for large data.
"""

import re
from collections.abc import Iterator, Sequence
from typing import IO, Any

from jllm.data.sources.blocks import BLOCK_BYTES, Block
from jllm.data.sources.inputs import Source
from jllm.data.sources.records import Records
from jllm.errors import UserError

# Runs of plain characters are taken whole and never given back (`*+`): 6 times faster than character by character.
_TOKENS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+("?)|[\[\]{},]', re.DOTALL)
_CLOSING = {b"]"[0], b"}"[0]}
_OPENING = {b"["[0], b"{"[0]}


def open_parquet(source: Source) -> Any:
    """A source as pyarrow's `ParquetFile`.

    Raises:
        UserError: it is none.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    handle: Any = source.path
    if "://" in source.path:
        import fsspec

        handle = fsspec.open(source.path, "rb").open()
    try:
        return pq.ParquetFile(handle, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"-i {source.name}: cannot be read as Parquet: {error}") from None


def parquet_blocks(
    source: Source, number: int, start: int, index: int, columns: Sequence[str] | None
) -> Iterator[Block]:
    """Blocks of rows from row `start` on. Rows are numbered from 1 in `Block.line`.

    Raises:
        UserError: not Parquet, or without the columns that are needed.
    """
    file = open_parquet(source)
    names = file.schema_arrow.names
    wanted = [name for name in names if columns is None or name in columns]
    if columns is not None and not wanted:
        raise UserError(f"-i {source.name}: no column {' or '.join(columns)} (columns: {', '.join(names[:12])})")
    row = 0
    for group in range(file.metadata.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if row + rows <= start:
            row += rows
            continue
        weight = file.metadata.row_group(group).total_byte_size
        step = max(1, rows * BLOCK_BYTES // max(1, weight))
        table = file.read_row_group(group, columns=wanted, use_threads=False)
        for begin in range(0, rows, step):
            data = table.slice(begin, step)
            end = row + begin + data.num_rows
            if end > start:
                yield Block(source=number, index=index, line=row + begin + 1, data=data, end=end, end_line=end + 1)
                index += 1
        row += rows


def parse_table(block: Block) -> Records:
    """The rows of a Parquet block as dicts."""
    values = block.data.to_pylist()
    return Records(values=values, lines=[block.line + i for i in range(len(values))], bad=[])


def json_list_blocks(
    stream: IO[bytes], held: bytes, number: int, position: int, line: int, index: int
) -> Iterator[Block]:
    """The elements of a JSON list, in blocks. `Block.data` is a list of the elements' bytes, `Block.line` counts
    elements.

    Args:
        held: what was already read of the stream.
        position, line: where reading starts: 0 and 1, or the end of an earlier block.
    """
    depth = 0 if line == 1 and position <= 3 else 1
    begin = at = size = 0
    elements: list[bytes] = []
    finished = False
    read_on = bool(held)  # a run that goes on at the end of a list has nothing to read
    while not finished:
        last = _element_ends(held, at, depth)
        for kind, end in last.events:
            if kind == "open":
                begin = end
                continue
            element = held[begin : end - 1]
            begin = end
            if element.strip():
                elements.append(element)
                size += len(element)
            if kind == "close":
                finished = True
                break
            if size >= BLOCK_BYTES:
                yield _elements_block(number, index, line, elements, position + end)
                index, line, elements, size = index + 1, line + len(elements), [], 0
        depth, at = last.depth, last.at
        if finished:
            break
        position, held, at, begin = position + begin, held[begin:], at - begin, 0
        piece = stream.read(max(BLOCK_BYTES, len(held)))
        if not piece:
            if held.strip():
                elements.append(held)
            if read_on and (not held.strip() or _is_json(held)):  # else the element itself is cut off, and bad
                elements.append(_CUT_OFF)
            begin = len(held)
            break
        read_on = True
        held += piece
    end = position + begin
    if finished:
        end, rest = position + len(held), held[begin:]
        while piece := stream.read(BLOCK_BYTES):
            end, rest = end + len(piece), rest.strip()[:1] + piece
        if rest.strip():
            elements.append(_TOO_MUCH)
    if elements:
        yield _elements_block(number, index, line, elements, end)


_CUT_OFF = b"(the file ends before its list does)"
_TOO_MUCH = b"(something follows the list)"
"""Stand for an element that is bad."""


def _is_json(data: bytes) -> bool:
    import orjson

    try:
        orjson.loads(data)
    except orjson.JSONDecodeError:
        return False
    return True


def _elements_block(number: int, index: int, line: int, elements: list[bytes], end: int) -> Block:
    return Block(source=number, index=index, line=line, data=elements, end=end, end_line=line + len(elements))


class _Scan:
    """Where elements end in a stretch of bytes, and how deep the nesting is at its end."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []
        self.depth = 0
        self.at = 0


def _element_ends(data: bytes, at: int, depth: int) -> _Scan:
    """Scan from `at`: the list opens ("open"), an element ends at a comma ("end"), the list closes ("close")."""
    scan = _Scan()
    for match in _TOKENS.finditer(data, at):
        byte = data[match.start()]
        if byte == b'"'[0] and not match.group(1):
            at = match.start()  # a string that goes on beyond what is held: scan it again once there is more
            break
        at = match.end()
        if byte in _OPENING:
            depth += 1
            if depth == 1:
                scan.events.append(("open", at))
        elif byte in _CLOSING:
            depth -= 1
            if depth <= 0:
                scan.events.append(("close", at))
                break
        elif byte == b","[0] and depth == 1:
            scan.events.append(("end", at))
    else:
        at = len(data)
    scan.depth, scan.at = depth, at
    return scan
