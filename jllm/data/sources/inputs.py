"""Which files an input names.

An input is a file, a folder (every data file below it), a glob, a URL that fsspec knows, or `-` for standard input.
Formats are text (documents separated by blank lines), JSON lines, a JSON list, and Parquet; each but the last may be
compressed. Names say which; `--input_format` says what they do not.
"""

import dataclasses
import glob
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from jllm.errors import UserError

KINDS = ("text", "jsonl", "json", "parquet", "ids")
"""`ids` is Parquet that holds token ids already (see `jllm.data.prepare.pretokenized`)."""
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
STDIN = "-"


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


def resolve(inputs: Sequence[str], *, kind: str | None = None) -> list[Source]:
    """The sources that the inputs name, in the order given; those of one folder or glob sorted by name.

    Args:
        kind: overrules what file names say.

    Raises:
        UserError: an input that does not exist, matches nothing, or has no data file in it.
    """
    sources: list[Source] = []
    for given in inputs:
        if given == STDIN:
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
        raise UserError(f"-i {without_password(given)}: cannot be listed: {safe(error)}") from None
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


def safe(error: Exception) -> str:
    """An error's text fit to be shown: without user and password."""
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
