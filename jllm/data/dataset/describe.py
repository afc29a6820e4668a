"""Makes the manifest of a folder that somebody else wrote, or changed, by reading all of it; and reads all of a set to
see whether it is what its manifest says.

A manifest that is there is never replaced unasked; one that this command made, and would make so again, is left as
it is. With a tokenizer one that lacks what is recorded today gets it,
after every file was found to be the one that it describes; fingerprint, history and all else stay.

Cost: every file is read twice, once for its rows and once for its checksum, on all cores; a few MiB a core in
memory.
"""

import collections
import dataclasses
import re
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from jllm.data.dataset.columns import COLUMNS, CU_SEQLENS, INPUT_IDS, LABELS, Int32, Int64, from_list_array
from jllm.data.dataset.files import ROW_GROUP_TOKENS, list_shards, sha256_of
from jllm.data.dataset.further import FurtherColumns, common
from jllm.data.dataset.manifest import (
    JOINED,
    MANIFEST_NAME,
    OTHER_CONTENT,
    DataSet,
    FileEntry,
    Manifest,
    Tokenizer,
    changed,
    entry_of_written,
    inherited,
    listed,
    one_tokenizer,
    open_data_set,
    read_manifest,
    restore,
    sets_in,
    write_manifest,
)
from jllm.data.dataset.reader import ShardReader
from jllm.data.dataset.shards import ShardStatistics
from jllm.data.dataset.token_counts import count_trained, real_lengths
from jllm.data.dataset.training_marks import check_labels
from jllm.errors import UserError

COMMAND = "manifest"
LARGE_GROUP = 32 * ROW_GROUP_TOKENS
_SPARK_FILE = re.compile(r"part-\d{5}-")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Described:
    """A file and what was seen in it; `last_ids` says how many documents end in each id."""

    entry: FileEntry
    last_ids: collections.Counter[int]


def describe_file(
    path: Path, folder: Path, columns: Sequence[str] | None = None, *, tokenizer: Tokenizer | None = None
) -> Described:
    """Count one file's rows and tokens and hash it; `columns` are read, or None for all that shards can have.

    Raises:
        UserError: it cannot be read, has ids below 0 or beyond the tokenizer's, labels that are neither the id nor
            -100, or nulls in a further column; the message names the file.
    """
    rows = tokens = trained = longest = 0
    largest = 0
    last_ids: collections.Counter[int] = collections.Counter()
    for batch in ShardReader(path, columns=columns):
        ids, offsets = from_list_array(batch.column(INPUT_IDS))
        if LABELS in batch.schema.names:
            check_labels(batch.column(INPUT_IDS), batch.column(LABELS), path, rows)
        if len(ids):
            _check_range(ids, offsets, path, rows, tokenizer)
            largest = max(largest, int(ids.max()))
        rows += batch.num_rows
        tokens += int(real_lengths(batch).sum())
        trained += count_trained(batch)
        longest = max(longest, int(np.diff(offsets).max(initial=0)))
        last_ids.update(_last_ids(batch).tolist())
    statistics = ShardStatistics(
        rows=rows,
        tokens=tokens,
        trained_tokens=trained,
        longest_row=longest,
        bytes=path.stat().st_size,
        sha256=sha256_of(path),
        largest_id=largest,
    )
    return Described(entry=entry_of_written(path, folder, statistics), last_ids=last_ids)


def _check_range(ids: Int32, offsets: Int64, path: Path, first_row: int, tokenizer: Tokenizer | None) -> None:
    beyond = tokenizer.vocab_size if tokenizer is not None else 1 << 31
    wrong = (ids < 0) | (ids >= beyond)
    if not wrong.any():
        return
    place = int(np.argmax(wrong))
    row = first_row + int(np.searchsorted(offsets, place, side="right")) - 1
    if ids[place] < 0:
        raise UserError(
            f"{path}: row {row} has negative token ids ({ids[place]}); input_ids must be ids of a vocabulary"
        )
    assert tokenizer is not None
    raise UserError(
        f"{path}: row {row} has the id {ids[place]}, and {tokenizer.name} has the ids 0 to {beyond - 1}; give the"
        " tokenizer that made the ids with --tokenizer"
    )


def _last_ids(batch: pa.RecordBatch) -> Int32:
    """The last id of each document that does not end because its row does; without boundaries, of each row."""
    ids, offsets = from_list_array(batch.column(INPUT_IDS))
    if CU_SEQLENS not in batch.schema.names:
        return ids[offsets[1:][np.diff(offsets) > 0] - 1]
    boundaries, places = from_list_array(batch.column(CU_SEQLENS))
    inner = np.ones(len(boundaries), dtype=bool)
    inner[places[:-1]] = inner[places[1:] - 1] = False
    at = boundaries + np.repeat(offsets[:-1], np.diff(places))
    return ids[at[inner & (boundaries > 0)] - 1]


def further_columns(paths: Sequence[Path], folder: Path) -> FurtherColumns:
    """The further columns of files below `folder`, by their footers."""
    found = {}
    for path in paths:
        reader = ShardReader(path)
        found[path.relative_to(folder).as_posix()] = reader.further
        reader.close()
    return common(found)


def describe(
    folder: Path, *, cores: int, tokenizer: Tokenizer | None, special_ids: Collection[int] = (), force: bool = False
) -> Manifest:
    """Write the manifest of all shards below `folder`, or add to the one that is there what `tokenizer` tells of it.

    Args:
        folder: of the data set.
        cores: files that are read at the same time.
        tokenizer: made the ids; None: the one that is recorded, where one is.
        special_ids: of it; the one that most documents end in is recorded.
        force: replace a manifest; its tokenizer, where none is given, and its chat template stay.

    Raises:
        UserError: no folder, no shards, a file that cannot be read or has ids of another tokenizer, or a manifest that
            is there and would become another one, or is not one of these files.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder of a data set")
    present = (folder / MANIFEST_NAME).exists()
    as_it_is = _own_manifest(folder) if present and not force and tokenizer is None else None
    amended = open_data_set(folder).manifest if present and not force and as_it_is is None else None
    paths = list_shards(folder) if amended is None else [folder / entry.path for entry in amended.files]
    if not paths and amended is None:
        raise UserError(f"{folder}: no Parquet shards below it; make some with: python -m jllm.raw2ids")
    recorded, facts = _recorded(folder)
    if amended is not None and recorded is not None and tokenizer is not None and not recorded.is_same(tokenizer):
        raise UserError(
            f"--tokenizer {tokenizer.name}: {folder} was made with another ({recorded.name}, {recorded.sha256[:12]});"
            " give that one, or --force to replace the manifest"
        )
    made_with = tokenizer or recorded
    further = further_columns(paths, folder)
    columns = [*COLUMNS, *further.types]  # what would be left out need not be sound
    with ThreadPoolExecutor(cores) as pool:
        found = list(pool.map(lambda path: describe_file(path, folder, columns, tokenizer=made_with), paths))
    if made_with is not None and special_ids:
        end = recorded.document_end if recorded is not None else None
        made_with = dataclasses.replace(
            made_with, document_end=_commonest_end(found, special_ids) if end is None else end
        )
    entries = tuple(each.entry for each in found)
    if amended is not None:
        manifest = dataclasses.replace(
            amended,
            files=tuple(_amended(old, new, folder) for old, new in zip(amended.files, entries, strict=True)),
            tokenizer=made_with,
            labels_checked=True,
        )
    else:
        manifest = Manifest(
            command=COMMAND,
            options={},
            files=entries,
            tokenizer=made_with,
            further=further,
            labels_checked=True,
            **facts,
        )
    if as_it_is is None:
        write_manifest(folder, manifest)
    elif manifest != as_it_is:
        raise _would_be_replaced(folder)
    return manifest


def _own_manifest(folder: Path) -> Manifest:
    """The manifest that an earlier run of this command made.

    Raises:
        UserError: another command made it, or nobody can read it.
    """
    try:
        manifest = read_manifest(folder)
    except UserError:
        manifest = None
    if manifest is None or manifest.command != COMMAND:
        raise _would_be_replaced(folder)
    return manifest


def _would_be_replaced(folder: Path) -> UserError:
    return UserError(
        f"{folder}: has a {MANIFEST_NAME}; check it with --verify, add a tokenizer's facts to it with --tokenizer,"
        " or replace it with --force"
    )


def _amended(old: FileEntry, new: FileEntry, folder: Path) -> FileEntry:
    """What a manifest says of a file, and what it does not say yet; the fingerprint, and so the checksum, stays."""
    if old.sha256 not in (None, new.sha256):
        raise restore(f"{folder / old.path}{OTHER_CONTENT}")
    return dataclasses.replace(new, path=old.path, sha256=old.sha256)


def _commonest_end(found: Sequence[Described], special_ids: Collection[int]) -> int | None:
    """The special id that more than half of the documents end in."""
    ends = sum((each.last_ids for each in found), start=collections.Counter[int]())
    for last, count in ends.most_common(1):
        if last in special_ids and 2 * count > ends.total():
            return last
    return None


def _recorded(folder: Path) -> tuple[Tokenizer | None, dict[str, Any]]:
    """Tokenizer, and what else is inherited, of a folder's manifest, or of those of the data sets in it, which must
    agree."""
    try:
        manifest = read_manifest(folder)
    except UserError:  # edited by hand; that is what this command repairs
        return None, {}
    if manifest is not None:
        return manifest.tokenizer, inherited([DataSet(folder=folder, manifest=manifest)])
    sets = [DataSet(folder=place, manifest=manifest) for place, manifest in sets_in(folder).items()]
    return one_tokenizer(sets), inherited(sets)


def warnings_about(folder: Path) -> list[str]:
    """What is odd about a folder without being wrong, one line each."""
    found = []
    if inner := list(sets_in(folder)):
        found.append(
            f"{folder}: {len(inner)} of its sub-folders are data sets of their own ({inner[0].name}, ...); with a"
            " manifest above them they are one"
        )
    for path in list_shards(folder):
        if _SPARK_FILE.match(path.name) and not _has_success(path, folder):
            found.append(f"{path.parent}: written by Spark, without _SUCCESS: make sure that its job ended well")
            break
    for path in list_shards(folder):
        metadata = ShardReader(path).metadata
        groups = (metadata.row_group(index) for index in range(metadata.num_row_groups))
        if any(group.column(0).num_values > LARGE_GROUP for group in groups):
            found.append(f"{path}: has large row groups, which take much memory in training; shuffling rewrites them")
            break
    return found


def _has_success(path: Path, folder: Path) -> bool:
    return any((parent / "_SUCCESS").exists() for parent in path.parents if parent.is_relative_to(folder))


def verify(data_set: DataSet, *, cores: int = 1) -> list[str]:
    """Read every file; all problems found, one line each. A file without a checksum is one."""

    def of_file(entry: FileEntry) -> str | None:
        path = data_set.folder / entry.path
        try:
            if problem := changed(path, entry):
                return problem
            if entry.sha256 is None:
                return f"{path}: has no checksum; give it one with: jllm manifest --force {data_set.folder}"
            matches = sha256_of(path) == entry.sha256
        except UserError as error:
            return str(error)
        except OSError as error:
            return f"{path}: {error.strerror}"
        return None if matches else f"{path}: the content does not match its checksum"

    with ThreadPoolExecutor(cores) as pool:
        return [problem for problem in pool.map(of_file, data_set.manifest.files) if problem is not None]


def verify_folder(folder: Path, *, cores: int = 1) -> DataSet:
    """A data set of which every file was read and found to be what its manifest says, or that of the set it is in.

    Raises:
        UserError: a file is missing, added or damaged, all of which are named, or nobody ever took its checksum.
    """
    data_set, added = listed(folder)
    if data_set.manifest.command == JOINED and None in {entry.sha256 for entry in data_set.manifest.files}:
        raise UserError(
            f"{folder}: has no {MANIFEST_NAME} that says what its files must be; make one with: jllm manifest {folder}"
        )
    problems = [*(f"{folder / name}: not in the manifest" for name in added), *verify(data_set, cores=cores)]
    if problems:
        raise UserError(
            f"{folder}: {len(problems)} of {len(data_set.manifest.files) + len(added)} files are not what they must"
            f" be: {'; '.join(problems)}; restore them, or make the data set again"
        )
    return data_set
