"""A source in chunks: consecutive whole records, about 4 MiB of them, cut without parsing them.

A record may have any size, a chunk can be parsed and encoded on any thread, and reading can start again at any chunk.
Text and JSON lines are cut here, at places that `text.py` and `json_lines.py` find, or planned from a few bytes of each
chunk (`plain_files.py`); JSON lists and Parquet files cut themselves (`json_list.py`, `parquet.py`).

Guarantees: the chunks of a source are a function of its content alone. A record of more than `most` bytes is refused
before it is held as a whole.
Cost: one pass over the bytes; memory for one chunk, or one record where that is larger.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

from jllm.data.sources import first_bytes, json_lines, json_list, parquet, plain_files, text
from jllm.data.sources.chunk import Chunk
from jllm.data.sources.inputs import STDIN, Source, safe, without_password
from jllm.data.sources.records import LARGEST_RECORD, RefusedRecordError, too_large
from jllm.data.sources.streams import open_source, read_exactly, reading_errors, skip
from jllm.errors import UserError

CHUNK_BYTES = 4 << 20
_COUNTED_AT_ONCE = 1 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_LAST_BOUNDARY: dict[str, Callable[[bytes, int, int], int]] = {
    "text": text.last_boundary,
    "jsonl": json_lines.last_boundary,
}
_RECORD_BEYOND: dict[str, Callable[[bytes, int], int | None]] = {
    "text": text.record_beyond,
    "jsonl": json_lines.record_beyond,
}


def read_chunks(
    source: Source,
    number: int,
    *,
    start: int = 0,
    line: int = 1,
    index: int = 0,
    columns: Sequence[str] | None = None,
    most: int = LARGEST_RECORD,
    planned: bool = False,
) -> Iterator[Chunk]:
    """The chunks of a source, from where an earlier chunk ended (`Chunk.end`, `Chunk.end_line`).

    Args:
        number: the source's index, put into the chunks.
        start, line, index: where to start: byte (row), its line, and the number of the first chunk.
        columns: Parquet columns to read; None reads all.
        most: bytes of the largest record, decompressed (`--max_record`).
        planned: chunks of a plain local file come without their bytes, and without lines: `opened` brings both.

    Raises:
        UserError: the source cannot be read: it is damaged, cut short, or not what its name says; or holds a larger
            record.
    """
    try:
        if source.kind in ("parquet", "ids"):
            yield from parquet.chunks(source, number, start, index, columns, CHUNK_BYTES)
        else:
            yield from _byte_chunks(source, number, start, line, index, most, planned)
    except RefusedRecordError as error:
        raise error.of(without_password(source.path)) from None
    except reading_errors() as error:
        raise UserError(f"-i {without_password(source.path)}: cannot be read: {safe(error)}") from None


def opened(chunk: Chunk, kind: str, most: int) -> Chunk:
    """A chunk with its bytes and lines, of which the first is 1 where it is planned. Of a large one the lines alone are
    counted, some bytes at a time: it is read where it is parsed, and its bytes need not stay longer than that.

    Raises:
        RefusedRecordError: a record is larger than `most`.
        UserError: the bytes are no longer there.
    """
    if chunk.is_counted:
        return chunk
    if isinstance(chunk.data, int) and 4 * CHUNK_BYTES < chunk.data <= most:
        counted = sum(map(json_lines.count_lines, chunk.stretches(_COUNTED_AT_ONCE)))
        return dataclasses.replace(chunk, line=1, end_line=1 + counted)
    data = chunk.content
    if len(data) > most and (lines := _RECORD_BEYOND.get(kind, json_lines.record_beyond)(data, most)) is not None:
        raise too_large(most, 1 + lines)
    kept = data if len(data) <= 4 * CHUNK_BYTES else len(data)
    return dataclasses.replace(chunk, data=kept, line=1, end_line=1 + json_lines.count_lines(data))


def _byte_chunks(
    source: Source, number: int, start: int, line: int, index: int, most: int, planned: bool
) -> Iterator[Chunk]:
    stream = open_source(source)
    kind = source.kind
    is_plain = source.compression is None and source.is_local and not source.once
    file = source.path if is_plain else None
    try:
        skip(stream, start, seekable=source.compression is None and not source.once)
        held, position = b"", start
        if start == 0:
            held = read_exactly(stream, 64)
            if held.startswith(_BYTE_ORDER_MARK):  # which is no text
                held, position = held[3:], 3
            wrong = first_bytes.mistake(held)
            if wrong is not None:
                raise UserError(f"-i {without_password(source.path)}: {wrong}")
        if kind == "json":
            if start == 0:
                held += read_exactly(stream, CHUNK_BYTES - len(held))
            form = json_list.layout(held if start == 0 else _head_of(source))
            if form != "lines":
                goes_on = start > 0 and _byte_before(source, start) == b","
                yield from json_list.chunks(
                    stream, held, number, position, line, index, CHUNK_BYTES, most=most, form=form, goes_on=goes_on
                )
                return
            kind = "jsonl"  # under the name of .json
        if planned and is_plain and plain_files.can_be_planned(stream):
            yield from plain_files.chunks(
                stream, source.path, number, position, line, index, CHUNK_BYTES, most, _LAST_BOUNDARY[kind]
            )
            return
        last_boundary, record_beyond = _LAST_BOUNDARY[kind], _RECORD_BEYOND[kind]
        searched, window = 0, CHUNK_BYTES
        while True:
            # Where no record ends in the window, it is doubled: the work stays in proportion to the record, and where a
            # chunk ends depends on where it starts and on nothing else.
            if len(held) < window:
                more = read_exactly(stream, window - len(held))
                held = held + more if held else more
            at_end = len(held) < window
            cut = len(held) if at_end else last_boundary(held, searched, window)
            if cut:
                data, held, searched, window = held[:cut], held[cut:], 0, CHUNK_BYTES
                position += cut
                if len(data) > most and (lines := record_beyond(data, most)) is not None:
                    raise too_large(most, line + lines)
                end_line = line + json_lines.count_lines(data)
                yield Chunk(
                    source=number, index=index, line=line, data=data, end=position, end_line=end_line, file=file
                )
                index, line = index + 1, end_line
            elif window > most:
                raise too_large(most, line)
            else:  # never more than it takes to see that a record is too large
                searched, window = window, 2 * window if 2 * window < most else max(window, most) + 1
            if at_end:
                return
    finally:
        if source.path != STDIN:
            stream.close()


def _head_of(source: Source) -> bytes:
    with contextlib.closing(open_source(source)) as stream:
        return read_exactly(stream, CHUNK_BYTES + 3).removeprefix(_BYTE_ORDER_MARK)[:CHUNK_BYTES]


def _byte_before(source: Source, position: int) -> bytes:
    with contextlib.closing(open_source(source)) as stream:
        skip(stream, position - 1, seekable=source.compression is None)
        return stream.read(1)
