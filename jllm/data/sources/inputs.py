"""Which files an input names.

An input is a file, a folder (every data file below it), a glob, a URL that fsspec knows, or `-` for standard input.
Formats are text (documents separated by blank lines), JSON lines, a JSON list, and Parquet; each but the last may be
compressed. Names say which; `--input_format` says what they do not.

Guarantees: every data file of a folder is found, behind links too, or refused by name: links that lead nowhere, files
that may not be read, pipes among files. Data sets of ours inside a folder are passed over, and said so.
Cost: each local file is opened once.
"""

import dataclasses
import glob
import os
import re
import stat
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

from jllm import atomic
from jllm.data.sources import first_bytes
from jllm.errors import UserError, printable, say

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
        stem: the name without folders and known suffixes, as splits are called after it (see `stem_of`).
        kind: out of `KINDS`.
        compression: `gzip`, `zstd`, `bz2`, `xz`, or None.
        size: bytes on disk, or None where that is unknown.
        once: it can be read once only, and may be something else the next time: standard input, a pipe.
    """

    path: str
    name: str
    stem: str
    kind: str
    compression: str | None
    size: int | None
    once: bool = False

    @property
    def is_local(self) -> bool:
        """Whether it has a path in this machine's file systems."""
        return self.path != STDIN and "://" not in self.path


def _tell(line: str) -> None:
    say(line, file=sys.stderr, flush=True)


def resolve(
    inputs: Sequence[str],
    *,
    kind: str | None = None,
    passed_over: Collection[str] = (),
    say: Callable[[str], None] = _tell,
) -> list[Source]:
    """The sources that the inputs name, in the order given; those of one folder or glob sorted by name.

    Args:
        kind: overrules what file names say.
        passed_over: folders with a file or folder of such a name are, where they lie inside an input.
        say: hears of them.

    Raises:
        UserError: an input that does not exist, cannot be read, matches nothing, or has no data file in it.
    """
    sources: list[Source] = []
    for given in inputs:
        if given == STDIN:
            first = sys.stdin.buffer.peek(64)[:64].lstrip()  # type: ignore[union-attr]
            guess = "jsonl" if first[:1] in (b"{", b"[") else "text"
            sources.append(
                Source(
                    path=given, name="stdin", stem="stdin", kind=kind or guess, compression=None, size=None, once=True
                )
            )
        elif "://" in given:
            sources.extend(_resolve_url(given, kind, passed_over, say))
        else:
            sources.extend(_resolve_local(given, kind, passed_over, say))
    for source in sources:
        if source.once and source.kind in ("parquet", "ids"):
            raise UserError(f"-i {source.path}: Parquet is not read from its begin to its end; save it to a file first")
    refuse_twice(sources)
    return sources


def refuse_twice(sources: Sequence[Source]) -> None:
    """Raises:
    UserError: a file is named twice, perhaps under two names.
    """
    seen: dict[str, str] = {}
    for source in sources:
        place = os.path.realpath(source.path) if source.is_local else source.path
        if place in seen:
            other = "" if seen[place] == source.path else f" (also as {seen[place]})"
            raise UserError(f"-i: {without_password(source.path)} is named twice{other}; name each file once")
        seen[place] = source.path


def _resolve_local(
    given: str, kind: str | None, passed_over: Collection[str], say: Callable[[str], None]
) -> list[Source]:
    path = Path(given).expanduser()
    try:
        if path.is_dir():
            skipped: list[Path] = []
            found, root = _once_each(_files_below(path, kind, passed_over, skipped)), path
            _say_skipped(given, [each.relative_to(path).as_posix() for each in skipped], say)
            if not found:
                besides = " (but data sets of ours, which are passed over)" if skipped else ""
                raise UserError(f"-i {given}: no data file below this folder{besides}; known are {_known_suffixes()}")
        elif path.exists():
            found, root = [path], path.parent
        else:
            found = [Path(name) for name in glob.glob(str(path), recursive=True) if not Path(name).is_dir()]
            if path.is_symlink():
                raise UserError(f"-i {given}: a link that leads to no file; repair it, or leave it out")
            if not found:
                raise UserError(
                    f"-i {given}: no such file or folder; give a file, a folder, a glob, a URL, or - for stdin"
                )
            root = Path(os.path.commonpath([str(item.parent) for item in found]))
            if "**" in given:
                found = _outside_data_sets(given, root, found, passed_over, say)
    except OSError as error:
        raise UserError(f"-i {error.filename or given}: cannot be read: {error.strerror or error}") from None
    found.sort(key=lambda item: item.relative_to(root).as_posix())
    alone = found == [path]
    return [_local_source(item, item.relative_to(root).as_posix(), kind, alone=alone) for item in found]


def _files_below(
    folder: Path, kind: str | None, passed_over: Collection[str], skipped: list[Path]
) -> Iterator[tuple[bool, Path]]:
    """The data files below a folder, each with whether it lies behind a link; data sets found on the way are noted."""
    top = os.path.realpath(folder)
    for place, folders, files in atomic.walk(folder):
        if place != folder and not set(passed_over).isdisjoint((*files, *folders)):
            skipped.append(place)
            folders.clear()
            continue
        folders[:] = [name for name in folders if name[0] not in "_."]
        behind = os.path.realpath(place) != os.path.normpath(os.path.join(top, place.relative_to(folder)))
        for name in files:
            if name[0] not in "_." and (kind or _kind_of(name)[0]):
                yield behind or (place / name).is_symlink(), place / name


def _once_each(found: Iterator[tuple[bool, Path]]) -> list[Path]:
    """Files without those that are others under a further name, which a link gave them."""
    kept: dict[str, Path] = {}
    for _, path in sorted(found):
        kept.setdefault(os.path.realpath(path), path)
    return list(kept.values())


def _outside_data_sets(
    given: str, root: Path, found: list[Path], passed_over: Collection[str], say: Callable[[str], None]
) -> list[Path]:
    """What a recursive glob found, without the files of data sets below the folder that it looks through."""
    sets: dict[Path, bool] = {root: False}

    def is_within(folder: Path) -> bool:
        if folder not in sets:
            sets[folder] = any((folder / name).exists() for name in passed_over) or is_within(folder.parent)
        return sets[folder]

    kept = [path for path in found if not is_within(path.parent)]
    tops = [place for place, inside in sets.items() if inside and not sets.get(place.parent, False)]
    _say_skipped(given, [place.relative_to(root).as_posix() for place in tops], say)
    if not kept:
        raise UserError(f"-i {given}: matches nothing but files of data sets, which are passed over; name one itself")
    return kept


def _say_skipped(given: str, names: list[str], say: Callable[[str], None]) -> None:
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        say(
            printable(
                f"-i {without_password(given)}: passed over {min(names)}{more}: made by jllm, not to be read again"
            )
        )


def _local_source(path: Path, name: str, kind: str | None, *, alone: bool) -> Source:
    """A local file as a source.

    Raises:
        UserError: it cannot be opened; or is a pipe or the like, and was not given by its own name.
    """
    try:
        facts = path.stat()
        once = not stat.S_ISREG(facts.st_mode)
        if once and not alone:
            raise UserError(f"-i {path}: is no regular file; leave it out, or give it by its own name")
        head = b""
        if not once:
            with path.open("rb", buffering=0) as file:
                head = file.read(first_bytes.LOOKED_AT)
    except OSError as error:
        reason = "a link that leads to no file" if path.is_symlink() else f"cannot be read: {error.strerror or error}"
        raise UserError(f"-i {path}: {reason}; repair it, or leave it out") from None
    source = source_of(str(path), name, None if once else facts.st_size, kind, once=once)
    is_text = source.compression is None and source.kind not in ("parquet", "ids")
    wrong = first_bytes.mistake(head) if is_text else None
    if wrong is not None:
        raise UserError(f"-i {path}: {wrong}")
    return source


def _resolve_url(
    given: str, kind: str | None, passed_over: Collection[str], say: Callable[[str], None]
) -> list[Source]:
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(given)
        if glob.has_magic(given):
            found = [name for name in system.glob(path) if system.isfile(name)]
        elif system.isdir(path):
            found = found_at_url(given, path, system.find(path), kind, passed_over, say)
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
        sources.append(source_of(url, relative or name.rsplit("/", 1)[-1], sizes[name], kind))
    return sources


def found_at_url(
    given: str,
    root: str,
    names: list[str],
    kind: str | None,
    passed_over: Collection[str],
    say: Callable[[str], None] = _tell,
) -> list[str]:
    """The data files out of all files of a folder, by the rules for local folders."""
    inside = {name: name[len(root) :].lstrip("/").split("/") for name in names}
    sets = {tuple(parts[:i]) for parts in inside.values() for i in range(1, len(parts)) if parts[i] in passed_over}
    _say_skipped(given, ["/".join(parts) for parts in sets], say)
    return [
        name
        for name, parts in inside.items()
        if not any(part[:1] in ("_", ".") for part in parts)
        and not any(tuple(parts[:i]) in sets for i in range(1, len(parts)))
        and (kind or _kind_of(parts[-1])[0])
    ]


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


STEM_BYTES = 160
_UNFIT = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff/\\\\]")


def stem_of(name: str) -> str:
    """What the splits of a file are called after.

    Its name without known suffixes: without the `_` or `.` at its begin that readers of data sets pass over, what no
    file system or terminal takes well replaced, and cut to `STEM_BYTES`, which leaves room for numbers and suffixes.
    """
    stem = _UNFIT.sub("_", _kind_of(name)[2]).lstrip("_.")
    return stem.encode()[:STEM_BYTES].decode(errors="ignore") or "data"


def source_of(path: str, name: str, size: int | None, kind: str | None, *, once: bool = False) -> Source:
    """A file as a source: what its name says of it, or `kind`.

    Raises:
        UserError: neither says what it is.
    """
    base = name.rsplit("/", 1)[-1].split("?")[0] if "://" in path else name.rsplit("/", 1)[-1]
    guess, compression, _ = _kind_of(base)
    chosen = kind or guess
    if chosen is None:
        raise UserError(
            f"-i {without_password(path)}: the name does not say what it is (known: {_known_suffixes()}); say it with"
            " --input_format"
        )
    return Source(
        path=path, name=printable(name), stem=stem_of(base), kind=chosen, compression=compression, size=size, once=once
    )
