"""Files to records: which files an input names, and the records in them with file and line.

An input is a file, a folder (every data file below it), a glob, a URL that fsspec knows, or `-` for standard input.
Formats are text (documents separated by blank lines), JSON lines, a JSON list, and Parquet; each but the last may be
compressed. A source is read in blocks of about 2 MiB cut between records, so that a record may have any size, a block
can be parsed and encoded on any thread, and reading can start again at any block.

Guarantees: the blocks of a source are a function of its content alone; a bad record becomes a `BadRecord` with its
line and never changes its neighbours.
Cost: one pass over the bytes; memory for one block, or one record where that is larger.
"""

import bz2
import dataclasses
import glob
import gzip
import io
import lzma
import os
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from jllm.errors import UserError

BLOCK_BYTES = 2 << 20
KINDS = ("text", "jsonl", "json", "parquet", "ids")
"""`ids` is Parquet that holds token ids already (see `jllm.data.pretokenized`)."""
_KIND_OF_SUFFIX = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
}
_COMPRESSION_OF_SUFFIX = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
_STDIN = "-"
_BLANK = b" \t\r\f\v"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """One input file.

    Attributes:
        path: what to open: a local path, a URL, or `-`.
        name: the path below the folder or glob that was given: the same wherever the data lies.
        stem: the name without folders and known suffixes.
        kind: out of `KINDS`.
        compression: `gzip`, `zstd`, `bz2`, `xz`, or None.
        size: bytes on disk, or None where that is unknown.
    """

    path: str
    name: str
    stem: str
    kind: str
    compression: str | None
    size: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class BadRecord:
    """A record that could not be used: what is wrong with it, and where it starts (1-based line, or row, or
    element)."""

    kind: str
    line: int
    detail: str


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
    """

    source: int
    index: int
    line: int
    data: Any
    end: int
    end_line: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Records:
    """The records of one block in order, and what was bad: `values[i]` was found at line `lines[i]`."""

    values: list[Any]
    lines: list[int]
    bad: list[BadRecord]


def resolve(inputs: Sequence[str], *, kind: str | None = None) -> list[Source]:
    """The sources that the inputs name, in the order given; those of one folder or glob sorted by name.

    Args:
        kind: overrules what file names say.

    Raises:
        UserError: an input that does not exist, matches nothing, or has no data file in it.
    """
    sources: list[Source] = []
    for given in inputs:
        if given == _STDIN:
            first = sys.stdin.buffer.peek(64)[:64].lstrip()  # type: ignore[union-attr]
            guess = "jsonl" if first[:1] in (b"{", b"[") else "text"
            sources.append(
                Source(path=given, name="stdin", stem="stdin", kind=kind or guess, compression=None, size=None)
            )
        elif "://" in given:
            sources.extend(_resolve_url(given, kind))
        else:
            sources.extend(_resolve_local(given, kind))
    duplicates = {source.path for source in sources if sum(other.path == source.path for other in sources) > 1}
    if duplicates:
        raise UserError(f"-i: {min(duplicates)} is named twice; name each file once")
    return sources


def _resolve_local(given: str, kind: str | None) -> list[Source]:
    path = Path(given).expanduser()
    if path.is_dir():
        found = [
            Path(parent, name)
            for parent, folders, files in os.walk(path)
            if _visible(folders)
            for name in files
            if name[0] not in "_." and (kind or _kind_of(name)[0])
        ]
        if not found:
            raise UserError(f"-i {given}: no data file below this folder; known are {_known_suffixes()}")
        root = path
    elif path.exists():
        found, root = [path], path.parent
    else:
        found = [Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file()]
        if not found:
            raise UserError(f"-i {given}: no such file or folder; give a file, a folder, a glob, a URL, or - for stdin")
        root = Path(os.path.commonpath([str(item.parent) for item in found]))
    found.sort(key=lambda item: item.relative_to(root).as_posix())
    return [_source(str(item), item.relative_to(root).as_posix(), item.stat().st_size, kind) for item in found]


def _visible(folders: list[str]) -> bool:
    folders[:] = [name for name in folders if name[0] not in "_."]
    return True


def _resolve_url(given: str, kind: str | None) -> list[Source]:
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(given)
        if glob.has_magic(given):
            found = [name for name in system.glob(path) if system.isfile(name)]
        elif system.isdir(path):
            found = [name for name in system.find(path) if kind or _kind_of(name.rsplit("/", 1)[-1])[0]]
        else:
            found = [path] if system.exists(path) else []
        sizes = {name: system.size(name) for name in found}
    except ImportError as error:
        raise UserError(f"-i {without_password(given)}: {error}") from None
    except Exception as error:  # every file system has its own errors
        raise UserError(f"-i {without_password(given)}: cannot be listed: {_safe(error)}") from None
    if not found:
        raise UserError(f"-i {without_password(given)}: nothing there; give a file, a folder, or a glob")
    root = path.rsplit("/", 1)[0] if found == [path] else path.split("*")[0].rstrip("/")
    sources = []
    for name in sorted(found):
        relative = name[len(root) :].lstrip("/") if name.startswith(root) else name.rsplit("/", 1)[-1]
        url = name if "://" in name else system.unstrip_protocol(name)
        sources.append(_source(url, relative or name.rsplit("/", 1)[-1], sizes[name], kind))
    return sources


def without_password(url: str) -> str:
    """A URL fit to be shown: without user, password, and query."""
    scheme, _, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rsplit('@', 1)[-1]}{slash}{path.split('?')[0]}" if rest else url


def _safe(error: Exception) -> str:
    return re.sub(r"://[^/@\s]+@", "://", str(error))


def _kind_of(name: str) -> tuple[str | None, str | None, str]:
    """Format, compression and stem, by the suffixes of a file name."""
    stem, compression, kind = name, None, None
    root, suffix = os.path.splitext(stem)
    if suffix.lower() in _COMPRESSION_OF_SUFFIX:
        stem, compression = root, _COMPRESSION_OF_SUFFIX[suffix.lower()]
        root, suffix = os.path.splitext(stem)
    if suffix.lower() in _KIND_OF_SUFFIX:
        stem, kind = root, _KIND_OF_SUFFIX[suffix.lower()]
    return kind, compression, stem


def _known_suffixes() -> str:
    return f"{', '.join(_KIND_OF_SUFFIX)}, each also with {', '.join(_COMPRESSION_OF_SUFFIX)}"


def _source(path: str, name: str, size: int | None, kind: str | None) -> Source:
    guess, compression, stem = _kind_of(name.rsplit("/", 1)[-1].split("?")[0])
    chosen = kind or guess
    if chosen is None:
        raise UserError(
            f"-i {without_password(path)}: the name does not say what it is (known: {_known_suffixes()}); say it with"
            " --input_format"
        )
    return Source(path=path, name=name, stem=stem, kind=chosen, compression=compression, size=size)


def open_source(source: Source) -> IO[bytes]:
    """The decompressed bytes of a source.

    Raises:
        UserError: it cannot be opened.
    """
    raw: Any
    try:
        if source.path == _STDIN:
            raw = sys.stdin.buffer
        elif "://" in source.path:
            import fsspec

            raw = fsspec.open(source.path, "rb").open()
        else:
            raw = open(source.path, "rb", buffering=0)  # noqa: SIM115 - the caller closes it
    except OSError as error:
        raise UserError(f"-i {without_password(source.path)}: cannot be opened: {error.strerror or error}") from None
    if source.compression == "gzip":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw))  # type: ignore[arg-type, return-value]
    if source.compression == "bz2":
        return bz2.BZ2File(raw)
    if source.compression == "xz":
        return lzma.LZMAFile(raw)
    if source.compression == "zstd":
        return io.BufferedReader(_ZstdFile(raw))  # type: ignore[return-value]
    return raw  # type: ignore[no-any-return]


class _ZstdFile(io.RawIOBase):
    """Decompresses frames one after another, and unlike zstandard's own reader notices a file that was cut short."""

    def __init__(self, raw: Any) -> None:
        import zstandard

        self._raw = raw
        self._new = zstandard.ZstdDecompressor().decompressobj
        self._frame = self._new()
        self._fed = False
        self._held = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._held:
            data = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._fed = self._new(), False
            data = data or self._raw.read(1 << 17)
            if not data:
                if self._fed:
                    raise EOFError("the file ends inside a zstd frame")
                return 0
            self._fed = True
            self._held = memoryview(self._frame.decompress(data))
        size = min(len(buffer), len(self._held))
        buffer[:size] = self._held[:size]
        self._held = self._held[size:]
        return size

    def close(self) -> None:
        self._raw.close()
        super().close()


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
            from jllm.data.tables import parquet_blocks

            columns = ("input_ids", "labels") if source.kind == "ids" else columns
            yield from parquet_blocks(source, number, start, index, columns)
        else:
            yield from _byte_blocks(source, number, start, line, index)
    except _reading_errors() as error:
        raise UserError(f"-i {without_password(source.path)}: cannot be read: {_safe(error)}") from None


def _reading_errors() -> tuple[type[Exception], ...]:
    """What damaged or missing files raise; zstandard's error once that module is in use."""
    module = sys.modules.get("zstandard")
    known = (OSError, EOFError, lzma.LZMAError, zlib.error)
    return (*known, module.ZstdError) if module else known


def _byte_blocks(source: Source, number: int, start: int, line: int, index: int) -> Iterator[Block]:
    stream = open_source(source)
    kind = source.kind
    try:
        _skip(stream, start, seekable=source.compression is None and source.path != _STDIN)
        held, position = b"", start
        if start == 0:
            held = _read_exactly(stream, 64)
            if held.startswith(b"\xef\xbb\xbf"):  # a byte order mark is no text
                held, position = held[3:], 3
        if kind == "json":
            from jllm.data.tables import json_list_blocks

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
                end_line = line + data.count(b"\n")
                yield Block(source=number, index=index, line=line, data=data, end=position, end_line=end_line)
                index, line = index + 1, end_line
            else:
                searched, window = window, 2 * window
            if at_end:
                return
    finally:
        if source.path != _STDIN:
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


def parse_block(block: Block, kind: str) -> Records:
    """The records of a block: texts for a text source, JSON values for the others.

    Runs on any thread; nothing but the block is looked at.
    """
    if kind == "text":
        return _parse_text(block)
    if kind == "parquet":
        from jllm.data.tables import parse_table

        return parse_table(block)
    if isinstance(block.data, list):
        return _parse_json(block.data, [block.line + i for i in range(len(block.data))])
    lines = block.data.split(b"\n")
    return _parse_json(lines, range(block.line, block.line + len(lines)))


def _parse_json(rows: Sequence[bytes], numbers: Sequence[int]) -> Records:
    import orjson

    values: list[Any] = []
    lines: list[int] = []
    bad: list[BadRecord] = []
    loads = orjson.loads
    for row, number in zip(rows, numbers, strict=True):
        if not row or row.isspace():
            continue
        try:
            value = loads(row)
        except orjson.JSONDecodeError as error:
            value = _tolerant(row, number, str(error), bad)
            if value is None:
                continue
        values.append(value)
        lines.append(number)
    return Records(values=values, lines=lines, bad=bad)


def _tolerant(row: bytes, number: int, message: str, bad: list[BadRecord]) -> Any:
    """What orjson refuses and the standard library reads (NaN, large numbers); None where the record is bad."""
    import json

    try:
        text = row.decode()
    except UnicodeDecodeError as error:
        bad.append(BadRecord(kind="not UTF-8", line=number, detail=f"byte {error.start}: {error.reason}"))
        return None
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        bad.append(BadRecord(kind="not UTF-8", line=number, detail="half of a surrogate pair"))
        return None
    except (ValueError, RecursionError):
        bad.append(BadRecord(kind="bad JSON", line=number, detail=message))
        return None
    return value


_BETWEEN_DOCUMENTS = re.compile(r"\n(?:[^\S\n]*\n)+")
_LEADING_BLANK = re.compile(r"(?:[^\S\n]*\n)+")


def _parse_text(block: Block) -> Records:
    """Documents of a text block: what stands between blank lines, without the line ends around it."""
    try:
        text, clean = block.data.decode(), True
    except UnicodeDecodeError:
        text, clean = block.data.decode(errors="surrogateescape"), False
    leading = _LEADING_BLANK.match(text)
    start = leading.end() if leading else 0
    documents: list[str] = []
    lines: list[int] = []
    bad: list[BadRecord] = []
    line, counted = block.line, 0
    pieces: list[tuple[int, int]] = []
    for separator in _BETWEEN_DOCUMENTS.finditer(text, start):
        pieces.append((start, separator.start()))
        start = separator.end()
    pieces.append((start, len(text)))
    for begin, end in pieces:
        document = text[begin:end]
        line += text.count("\n", counted, begin)
        counted = begin
        document = document.removesuffix("\n").removesuffix("\r")
        if not document or document.isspace():
            continue
        if not clean and re.search("[\udc80-\udcff]", document):
            bad.append(BadRecord(kind="not UTF-8", line=line, detail="bytes that are no UTF-8 text"))
            continue
        documents.append(document)
        lines.append(line)
    return Records(values=documents, lines=lines, bad=bad)


def field_of(value: Any, path: Sequence[str]) -> Any:
    """`value["a"]["b"]` for the path ("a", "b"); None where something on the way is missing.

    A key that itself contains dots is found too.
    """
    if isinstance(value, dict) and len(path) > 1 and ".".join(path) in value:
        return value[".".join(path)]
    for key in path:
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value


def texts_of(records: Records, kind: str, field: str) -> Records:
    """The documents of pretraining records: the texts themselves, or the text in each record's `field`."""
    if kind == "text":
        return records
    path = field.split(".")
    values: list[Any] = []
    lines: list[int] = []
    bad = list(records.bad)
    for record, line in zip(records.values, records.lines, strict=True):
        text = field_of(record, path)
        if isinstance(text, str):
            if text and not text.isspace():
                values.append(text)
                lines.append(line)
            else:
                bad.append(BadRecord(kind="empty document", line=line, detail=f'field "{field}" has no text'))
        elif text is None:
            keys = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
            bad.append(BadRecord(kind="missing field", line=line, detail=f'no "{field}" (there is: {keys[:80]})'))
        else:
            detail = f'"{field}" is {type(text).__name__}, not text'
            bad.append(BadRecord(kind="wrong type", line=line, detail=detail))
    bad.sort(key=lambda record: record.line)
    return Records(values=values, lines=lines, bad=bad)
