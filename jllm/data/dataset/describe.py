"""Makes the manifest of a folder that somebody else wrote, or changed, by reading all of it.

Cost: every file is read twice, once for its rows and once for its checksum, on all cores; a few MiB a core in
memory.
"""

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from jllm.data.dataset.columns import COLUMNS, INPUT_IDS, LABELS, from_list_array
from jllm.data.dataset.files import ROW_GROUP_TOKENS, list_shards
from jllm.data.dataset.further import FurtherColumns, common
from jllm.data.dataset.manifest import (
    FileEntry,
    Manifest,
    Tokenizer,
    entry_of_written,
    read_manifest,
    sha256_of,
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


def describe_file(path: Path, folder: Path, columns: Sequence[str] | None = None) -> FileEntry:
    """Count one file's rows and tokens and hash it; `columns` are read, or None for all that shards can have.

    Raises:
        UserError: it cannot be read, has negative token ids, or nulls in a further column; the message names the file.
    """
    rows = tokens = trained = longest = 0
    for batch in ShardReader(path, columns=columns):
        ids, offsets = from_list_array(batch.column(INPUT_IDS))
        if LABELS in batch.schema.names:
            check_labels(batch.column(INPUT_IDS), batch.column(LABELS), path, rows)
        if len(ids) and ids.min() < 0:
            raise UserError(f"{path}: has negative token ids ({ids.min()}); input_ids must be ids of a vocabulary")
        rows += batch.num_rows
        tokens += int(real_lengths(batch).sum())
        trained += count_trained(batch)
        longest = max(longest, int(np.diff(offsets).max(initial=0)))
    statistics = ShardStatistics(
        rows=rows,
        tokens=tokens,
        trained_tokens=trained,
        longest_row=longest,
        bytes=path.stat().st_size,
        sha256=sha256_of(path),
    )
    return entry_of_written(path, folder, statistics)


def further_columns(paths: Sequence[Path], folder: Path) -> FurtherColumns:
    """The further columns of files below `folder`, by their footers."""
    found = {}
    for path in paths:
        reader = ShardReader(path)
        found[path.relative_to(folder).as_posix()] = reader.further
        reader.close()
    return common(found)


def describe(folder: Path, *, cores: int, tokenizer: Tokenizer | None) -> Manifest:
    """Write the manifest of all shards below `folder`; one that exists gives its tokenizer, and is replaced.

    Raises:
        UserError: no folder, no shards, or a file that cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder of a data set")
    paths = list_shards(folder)
    if not paths:
        raise UserError(f"{folder}: no Parquet shards below it; make some with: python -m jllm.raw2ids")
    further = further_columns(paths, folder)
    columns = [*COLUMNS, *further.types]  # what would be left out need not be sound
    with ThreadPoolExecutor(cores) as pool:
        entries = tuple(pool.map(lambda path: describe_file(path, folder, columns), paths))
    manifest = Manifest(
        command=COMMAND,
        options={},
        files=entries,
        tokenizer=tokenizer or _tokenizer_recorded(folder),
        further=further,
    )
    write_manifest(folder, manifest)
    return manifest


def _tokenizer_recorded(folder: Path) -> Tokenizer | None:
    try:
        recorded = read_manifest(folder)
    except UserError:  # edited by hand; that is what this command repairs
        return None
    return recorded.tokenizer if recorded else None


def warnings_about(folder: Path) -> list[str]:
    """What is odd about a folder without being wrong, one line each."""
    found = []
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
