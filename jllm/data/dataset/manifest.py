"""What a data set is, where it came from, and whether it is intact.

A data set is a folder of shards, at any depth, with one `_manifest.json` at its top. The manifest names every file
with its rows, tokens, size and checksum, says how the set was made and with which tokenizer, and carries the set's
fingerprint: the hash of the files' names and contents, in order. Anything whose behaviour must not survive a change
of the data, such as a training run's position, is bound to that fingerprint.

A folder without a manifest (written by Spark, or put together by hand from several sets) is a data set too:
`open_data_set` joins the manifests found below it and reads the footers of the rest. Opening costs two small
reads for each file; it finds files that are missing, added, or changed in size or footer.
`jllm.data.dataset.describe.verify` reads everything.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jllm import __version__, atomic
from jllm.data.dataset.columns import Column
from jllm.data.dataset.files import footer_of, list_shards
from jllm.data.dataset.further import FurtherColumns, common
from jllm.data.dataset.reader import ShardReader
from jllm.data.dataset.shards import ShardStatistics
from jllm.errors import UserError
from jllm.guards.typed import MALFORMED, check_fields

MANIFEST_NAME = "_manifest.json"
FORMAT_VERSION = 1
JOINED = "join"
"""The command of what no command made: a folder without a manifest."""
COLUMNS_KEY, LEFT_OUT_KEY = "columns", "columns_left_out"
MISSING, CHANGED = ": listed in the manifest and not there", ": changed since its manifest was written"
OTHER_CONTENT = ": the content does not match its checksum"
NO_FURTHER = FurtherColumns()
DOCUMENTS, CHAT, PREFERENCE = "documents", "chat", "preference"
KINDS = {"pretrain": DOCUMENTS, "ft": CHAT, "preference": PREFERENCE}
"""What rows are, by the `--type` that they were made with."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One shard of a data set.

    Attributes:
        path: relative to the data set's folder, with forward slashes.
        rows, tokens, trained_tokens, longest_row: as in `ShardStatistics`; None where only the footer was read.
        bytes: size of the file.
        footer: sha256 of the Parquet footer, in hex: a cheap check that the file is still the one described.
        sha256: of the whole file, in hex; None where only the footer was read.
        largest_id: 0 where there is no id; None where nobody looked.
    """

    path: str
    rows: int
    tokens: int | None
    trained_tokens: int | None
    longest_row: int | None
    bytes: int
    footer: str
    sha256: str | None
    largest_id: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """The tokenizer that made the ids.

    Attributes:
        name: folder name or hub name, for people.
        vocab_size: number of ids, added tokens included.
        sha256: of the serialised backend (the text of tokenizer.json as the library writes it), in hex.
        vocabulary_sha256: of vocabulary and added tokens, in hex; the same for every version of the library.
        probe_ids: the ids of difficult texts.
        document_end: the id that documents end in.
        added_tokens: the ids of its added tokens.

    The last four are None where nobody recorded them.
    """

    name: str
    vocab_size: int
    sha256: str
    vocabulary_sha256: str | None = None
    probe_ids: dict[str, list[int]] | None = None
    document_end: int | None = None
    added_tokens: dict[str, int] | None = None

    def is_same(self, other: "Tokenizer") -> bool:
        """Whether both give the same ids: by the backend's hash, or else by vocabulary and probes, where known."""
        mine, others = ((each.vocabulary_sha256, each.probe_ids) for each in (self, other))
        return self.sha256 == other.sha256 or (None not in mine and mine == others)

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything known about a data set.

    `further` are the columns beside the contract's three; a manifest names them only where there are any. `extra` holds
    what only some commands add (bad records, engine, mixing).

    Attributes:
        labels_checked: every label of a token that can be predicted was found to be its id or -100.
        chat_template: what conversations were rendered with.
        kind: what rows are (`KINDS`); None where nobody recorded it, or they are of several kinds.
        reference: what made the reference log-probabilities of preference pairs; None where there are none.
    """

    command: str
    options: dict[str, Any]
    files: tuple[FileEntry, ...]
    tokenizer: Tokenizer | None = None
    sources: tuple[dict[str, Any], ...] = ()
    further: FurtherColumns = NO_FURTHER
    labels_checked: bool = False
    chat_template: str | None = None
    kind: str | None = None
    reference: dict[str, Any] | None = None
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    def total(self, name: str) -> int | None:
        """Sum over the files of `rows`, `tokens` or `trained_tokens`; None where some file does not know."""
        values = [getattr(entry, name) for entry in self.files]
        return None if None in values else sum(values)

    @property
    def rows(self) -> int:
        return sum(entry.rows for entry in self.files)

    @property
    def longest_row(self) -> int | None:
        lengths = [entry.longest_row for entry in self.files]
        return None if None in lengths else max((length for length in lengths if length is not None), default=0)

    @property
    def largest_id(self) -> int | None:
        """0 where there is no id; None where some file does not know."""
        found = [entry.largest_id for entry in self.files]
        return None if None in found else max((each for each in found if each is not None), default=0)

    @property
    def fingerprint(self) -> str:
        """sha256 over the files in order: path, rows, and content (or footer, where the content was not read)."""
        content = [(entry.path, entry.rows, entry.sha256 or entry.footer) for entry in self.files]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT_VERSION,
            "made_by": {"command": self.command, "options": self.options, "version": __version__},
            "tokenizer": self.tokenizer.to_json() if self.tokenizer else None,
            "rows": self.rows,
            "tokens": self.total("tokens"),
            "trained_tokens": self.total("trained_tokens"),
            "longest_row": self.longest_row,
            **({"largest_id": self.largest_id, "labels_checked": True} if self.labels_checked else {}),
            **({"chat_template": self.chat_template} if self.chat_template is not None else {}),
            **({"kind": self.kind} if self.kind is not None else {}),
            **({"reference": self.reference} if self.reference is not None else {}),
            **({COLUMNS_KEY: self.further.types} if self.further.carried else {}),
            **({LEFT_OUT_KEY: dict(self.further.left_out)} if self.further.left_out else {}),
            **self.extra,
            "sources": list(self.sources),
            "fingerprint": self.fingerprint,
            "files": [dataclasses.asdict(entry) for entry in self.files],
        }

    def _check_types(self) -> None:
        """Raises:
        TypeError: what was read is not what it must be; ValueError: a file lies outside the folder.
        """
        for entry in self.files:
            check_fields(entry)
            if problem := atomic.plain_name(entry.path):
                raise ValueError(f"path {problem}")
        if self.tokenizer is not None:
            check_fields(self.tokenizer)
            lists = [*(self.tokenizer.probe_ids or {}).values(), [*(self.tokenizer.added_tokens or {}).values()]]
            if not all(isinstance(ids, list) and all(type(each) is int for each in ids) for ids in lists):
                raise TypeError("probe_ids are no lists of ids, or added_tokens no ids")
        if self.kind not in (None, *KINDS.values()) or not isinstance(self.reference, dict | None):
            raise TypeError("kind or reference is none that there is")
        if not isinstance(self.command, str) or not isinstance(self.options, dict):
            raise TypeError("made_by is no command with options")
        if not all(isinstance(source, dict) for source in self.sources):
            raise TypeError("sources are no objects")

    @classmethod
    def from_json(cls, value: dict[str, Any], path: Path) -> "Manifest":
        if value.get("format") != FORMAT_VERSION:
            raise UserError(f"{path}: manifest format {value.get('format')!r}; this version reads {FORMAT_VERSION}")
        known = {"format", "made_by", "tokenizer", "rows", "tokens", "trained_tokens", "longest_row", "largest_id"}
        known |= {"sources", "fingerprint", "files", COLUMNS_KEY, LEFT_OUT_KEY, "labels_checked", "chat_template"}
        known |= {"kind", "reference"}
        try:
            manifest = cls(
                command=value["made_by"]["command"],
                options=value["made_by"]["options"],
                files=tuple(FileEntry(**entry) for entry in value["files"]),
                tokenizer=Tokenizer(**value["tokenizer"]) if value["tokenizer"] else None,
                sources=tuple(value["sources"]),
                further=FurtherColumns(
                    carried=tuple(Column.named(*each) for each in value.get(COLUMNS_KEY, {}).items()),
                    left_out=value.get(LEFT_OUT_KEY, {}),
                ),
                labels_checked=value.get("labels_checked") is True,
                chat_template=value.get("chat_template"),
                kind=value.get("kind"),
                reference=value.get("reference"),
                extra={key: item for key, item in value.items() if key not in known},
            )
            manifest._check_types()
            fingerprint = value["fingerprint"]
        except MALFORMED as error:
            raise UserError(
                f"{path}: not a jllm manifest ({error}); make it again with: jllm manifest --force FOLDER"
            ) from None
        if manifest.fingerprint != fingerprint:
            raise UserError(f"{path}: the fingerprint does not match the files it lists; the manifest was edited")
        return manifest


def entry_of_written(path: Path, folder: Path, statistics: ShardStatistics) -> FileEntry:
    """The entry of a shard that was just written."""
    return FileEntry(path=path.relative_to(folder).as_posix(), footer=footer_of(path), **dataclasses.asdict(statistics))


def entry_from_footer(path: Path, folder: Path) -> tuple[FileEntry, FurtherColumns]:
    """The entry of a shard of which only the footer is read, no tokens, no checksum; and its further columns."""
    reader = ShardReader(path)
    rows = reader.metadata.num_rows
    reader.close()
    entry = FileEntry(
        path=path.relative_to(folder).as_posix(),
        rows=rows,
        tokens=None,
        trained_tokens=None,
        longest_row=None,
        bytes=path.stat().st_size,
        footer=footer_of(path),
        sha256=None,
    )
    return entry, reader.further


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `folder/_manifest.json` atomically."""
    atomic.write_json(folder / MANIFEST_NAME, manifest.to_json())


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest at the top of `folder`, or None where there is none."""
    path = folder / MANIFEST_NAME
    value = atomic.read_object(path, "make it again with: jllm manifest --force FOLDER")
    return None if value is None else Manifest.from_json(value, path)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSet:
    """A folder of shards and what is known about it."""

    folder: Path
    manifest: Manifest

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def paths(self) -> list[Path]:
        """The shards, in the manifest's order."""
        return [self.folder / entry.path for entry in self.manifest.files]


def open_data_set(folder: Path) -> DataSet:
    """Open a data set and check that its files are the ones its manifest describes, by name, size and footer.

    Raises:
        UserError: no folder, no shards, or files that are missing, changed, or not in the manifest.
    """
    data_set, added = listed(folder)
    if added:
        raise not_described(folder, added[0])
    for entry in data_set.manifest.files:
        if problem := changed(folder / entry.path, entry):
            raise restore(problem)
    return data_set


def not_described(folder: object, name: str) -> UserError:
    return UserError(
        f"{folder}: {name} is not in its manifest; remove the file, or describe the folder"
        f" anew with: jllm manifest --force {folder}"
    )


def restore(problem: str) -> UserError:
    """What to do about a file of a data set that is not what it was."""
    return UserError(f"{problem}; restore it, or make the data set again")


def listed(folder: Path) -> tuple[DataSet, list[str]]:
    """A data set whose files nobody has looked at yet, and the shards that its manifest does not name."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder of a data set")
    shards = list_shards(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        if not shards:
            raise UserError(f"{folder}: no Parquet shards below it; make some with: python -m jllm.raw2ids")
        return DataSet(folder=folder, manifest=_joined(folder, shards)), []
    present = {path.relative_to(folder).as_posix() for path in shards}
    return DataSet(folder=folder, manifest=manifest), sorted(present - {entry.path for entry in manifest.files})


def changed(path: Path, entry: FileEntry) -> str | None:
    """What a look at its size and footer finds wrong with a file."""
    if not path.is_file():
        return f"{path}{MISSING}"
    if path.stat().st_size != entry.bytes or footer_of(path) != entry.footer:
        return f"{path}{CHANGED}"
    return None


def sets_in(folder: Path) -> dict[Path, Manifest]:
    """The data sets below a folder, itself not among them, at any depth."""
    places = [path.parent for path in sorted(folder.rglob(MANIFEST_NAME)) if path.parent != folder]
    seen = [place for place in places if not any(name[0] in "_." for name in place.relative_to(folder).parts)]
    found = {place: read_manifest(place) for place in seen}
    return {place: manifest for place, manifest in found.items() if manifest is not None}


def _joined(folder: Path, shards: list[Path]) -> Manifest:
    """The manifest of a folder without one: the sets below it, and footers for shards that are in none of them."""
    sets = sets_in(folder)
    entries: dict[str, FileEntry] = {}
    sources: list[dict[str, Any]] = []
    further: dict[str, FurtherColumns] = {}
    for place, manifest in sets.items():
        prefix = place.relative_to(folder).as_posix()
        further[prefix] = manifest.further
        for entry in manifest.files:
            moved = dataclasses.replace(entry, path=f"{prefix}/{entry.path}")
            entries[moved.path] = moved
        sources.append({"name": prefix, "fingerprint": manifest.fingerprint})
    data_sets = [DataSet(folder=place, manifest=manifest) for place, manifest in sets.items()]
    missing = [path for path in shards if path.relative_to(folder).as_posix() not in entries]
    for path in missing:
        name = path.relative_to(folder).as_posix()
        entries[name], further[name] = entry_from_footer(path, folder)
    return Manifest(
        command=JOINED,
        options={},
        files=tuple(entries[name] for name in sorted(entries)),
        tokenizer=one_tokenizer(data_sets),
        sources=tuple(sources),
        further=common(further),
        labels_checked=not missing and all(manifest.labels_checked for manifest in sets.values()),
        **inherited(data_sets),
    )


def data_sets_below(folder: Path) -> list[DataSet]:
    """The data sets of a folder: itself where it has a manifest or shards at its top, else each child with shards.

    Raises:
        UserError: no such folder, or no shards in it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a folder of data sets")
    itself = (folder / MANIFEST_NAME).is_file() or any(path.parent == folder for path in list_shards(folder))
    if itself:
        return [open_data_set(folder)]
    children = sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] not in "_.")
    sets = [open_data_set(child) for child in children if list_shards(child) or (child / MANIFEST_NAME).is_file()]
    if not sets:
        raise UserError(f"{folder}: no Parquet shards below it; make some with: python -m jllm.raw2ids")
    return sets


def one_tokenizer(sets: Iterable[DataSet]) -> Tokenizer | None:
    """The tokenizer of all sets that name one.

    Raises:
        UserError: two sets were made with different tokenizers.
    """
    found: tuple[DataSet, Tokenizer] | None = None
    for data_set in sets:
        tokenizer = data_set.manifest.tokenizer
        if tokenizer is None:
            continue
        if found is not None and not found[1].is_same(tokenizer):
            raise UserError(
                f"{found[0].folder} and {data_set.folder} were made with different tokenizers ({found[1].name},"
                f" {tokenizer.name}); use one tokenizer"
            )
        if found is None or found[1].vocabulary_sha256 is None:
            found = (data_set, tokenizer)
    return found[1] if found else None


def one_template(sets: Iterable[DataSet]) -> str | None:
    """The chat template of all sets that name one; None where none does, or two differ."""
    templates = {data_set.manifest.chat_template for data_set in sets} - {None}
    return templates.pop() if len(templates) == 1 else None


def one_kind(sets: Iterable[DataSet]) -> str | None:
    """What the rows of all sets are; None where nobody knows, or they are of several kinds.

    Raises:
        UserError: preference pairs among others: what trains on the one does not train on the other.
    """
    kinds: dict[str | None, DataSet] = {}
    for data_set in sets:
        kinds.setdefault(data_set.manifest.kind, data_set)
    if PREFERENCE in kinds and len(kinds) > 1:
        other = next(kind for kind in kinds if kind != PREFERENCE)
        raise UserError(
            f"{kinds[PREFERENCE].folder} has preference pairs, and {kinds[other].folder} {other or 'other rows'}; keep"
            " them apart"
        )
    return next(iter(kinds)) if len(kinds) == 1 else None


def one_reference(sets: Iterable[DataSet]) -> dict[str, Any] | None:
    """What made the reference log-probabilities of all sets; None where there are none, or several made them."""
    found = [data_set.manifest.reference for data_set in sets]
    return found[0] if found and all(each == found[0] for each in found) else None


def inherited(sets: Sequence[DataSet]) -> dict[str, Any]:
    """What a manifest has of the sets whose rows it lists, as arguments: template, kind, reference.

    Raises:
        UserError: as `one_kind`.
    """
    return {"chat_template": one_template(sets), "kind": one_kind(sets), "reference": one_reference(sets)}
