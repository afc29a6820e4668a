"""Small data sets for the tests: every row can be told from every other."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from jllm.data.dataset.manifest import Manifest, Tokenizer, entry_of_written, write_manifest
from jllm.data.dataset.shards import (
    CU_SEQLENS,
    INPUT_IDS,
    LABELS,
    ShardReader,
    ShardWriter,
    file_name,
    list_shards,
    schema,
    to_list_array,
)

ALL_COLUMNS = (INPUT_IDS, LABELS, CU_SEQLENS)
TOKENIZER = Tokenizer(name="toy", vocab_size=1000, sha256="0" * 64)


def rows_of(first: int, count: int, *, longest: int = 6, columns: Sequence[str] = ALL_COLUMNS) -> pa.RecordBatch:
    """`count` rows of 2 to `longest` tokens; row i starts with the number `first + i`."""
    numbers = np.arange(first, first + count)
    lengths = 2 + numbers % (longest - 1)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = np.repeat(numbers, lengths).astype(np.int32)
    labels = np.where(np.arange(len(ids)) % 3 == 0, -100, ids).astype(np.int32)
    boundaries = np.stack([np.zeros(count, np.int64), lengths], 1).ravel().astype(np.int32)
    arrays = {
        INPUT_IDS: to_list_array(ids, offsets),
        LABELS: to_list_array(labels, offsets),
        CU_SEQLENS: to_list_array(boundaries, np.arange(0, 2 * count + 1, 2)),
    }
    return pa.RecordBatch.from_arrays([arrays[name] for name in columns], schema=schema(columns))


def make_set(
    folder: Path,
    rows: int,
    files: int = 1,
    *,
    first: int = 0,
    longest: int = 6,
    columns: Sequence[str] = ALL_COLUMNS,
    tokenizer: Tokenizer | None = TOKENIZER,
) -> Path:
    """A data set of `rows` rows in `files` files, with a manifest."""
    split = f"{folder.name}-00000"
    entries = []
    for index in range(files):
        start, end = rows * index // files, rows * (index + 1) // files
        path = folder / split / file_name(split, index, "zstd")
        with ShardWriter(path, columns=columns) as writer:
            if end > start:
                writer.write(rows_of(first + start, end - start, longest=longest, columns=columns))
        entries.append(entry_of_written(path, folder, writer.statistics))
    write_manifest(folder, Manifest(command="test", options={}, files=tuple(entries), tokenizer=tokenizer))
    return folder


def table_of(folder: Path) -> pa.Table:
    """All rows of a folder, in the order of its files."""
    batches = [batch for path in list_shards(folder) for batch in ShardReader(path)]
    return pa.Table.from_batches(batches) if batches else schema([INPUT_IDS]).empty_table()


def row_numbers(folder: Path) -> list[int]:
    """The numbers that tell the rows of a `make_set` apart, in the order of the folder's files."""
    return [row[0] for row in table_of(folder).column(INPUT_IDS).to_pylist()]


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder and its bytes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }
