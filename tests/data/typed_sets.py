"""Data sets with further columns of any type, for the tests of what stores and rearranges them."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import strategies as st

from jllm.data.dataset.columns import ELEMENTS, FLOAT32, INT32, TEXT, Column, join_lists, schema, to_array
from jllm.data.dataset.further import FurtherColumns
from jllm.data.dataset.manifest import Manifest, entry_of_written, write_manifest
from jllm.data.dataset.reader import ShardReader
from jllm.data.dataset.shards import ShardWriter, file_name, list_shards
from tests.data.sets import ALL_COLUMNS, TOKENIZER, rows_of

EVERY_TYPE = tuple(
    Column(name=f"{element}{' list' if is_list else ''}", element=element, is_list=is_list)
    for element in ELEMENTS
    for is_list in (False, True)
)
# Names that a command might use for columns of its own, and such as hardly anybody gives.
NAMES = st.sampled_from(["file", "row", "0", "_position", "a.b", "`q`", "größe", "labels.low", "source", "ref_logps"])
COLUMNS_OF_ANY_TYPE = st.lists(
    st.builds(Column, name=NAMES, element=st.sampled_from(sorted(ELEMENTS)), is_list=st.booleans()),
    max_size=4,
    unique_by=lambda column: column.name,
)


def _floats_by_bits(count: int, rng: np.random.Generator) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Any 32 bits, NaN of every kind among them, and some numbers that are hard to get right."""
    odd = np.array([np.nan, np.inf, -np.inf, -0.0, 1e-45, 3.4028235e38], np.float32)
    bits = rng.integers(0, 1 << 32, count, dtype=np.uint32).view(np.float32)
    return np.where(rng.random(count) < 0.3, rng.choice(odd, count), bits).astype(np.float32)


def _texts(count: int, rng: np.random.Generator) -> list[str]:
    odd = ["", "日本語", "🦊 fox", "\x00", "a\nb", '"', "é" * 300, "s3://images/1.png"]
    return [odd[int(index)] for index in rng.integers(0, len(odd), count)]


def values_of(column: Column, rows: int, seed: int) -> pa.Array:
    """Random rows of a column."""
    rng = np.random.default_rng([seed, *column.name.encode()])
    lengths = rng.integers(0, 5, rows) if column.is_list else np.ones(rows, np.int64)
    count = int(lengths.sum())
    elements: pa.Array
    if column.element == TEXT:
        elements = pa.array(_texts(count, rng), pa.string())
    elif column.element == FLOAT32:
        elements = to_array(_floats_by_bits(count, rng))
    else:
        assert column.element == INT32
        elements = to_array(rng.integers(-(2**31), 2**31, count).astype(np.int32))
    return join_lists(elements, np.concatenate([[0], np.cumsum(lengths)])) if column.is_list else elements


def typed_rows(
    first: int, count: int, further: Sequence[Column], *, columns: Sequence[str] = ALL_COLUMNS
) -> pa.RecordBatch:
    """Rows as of `rows_of`, with random values in further columns."""
    rows = rows_of(first, count, columns=columns)
    wanted = schema(columns, further)
    known = dict(zip(rows.schema.names, rows.columns, strict=True))
    known |= {each.name: values_of(each, count, first) for each in further}
    return pa.RecordBatch.from_arrays([known[name] for name in wanted.names], schema=wanted)


def make_typed_set(
    folder: Path,
    rows: int,
    further: Sequence[Column],
    *,
    files: int = 1,
    first: int = 0,
    columns: Sequence[str] = ALL_COLUMNS,
) -> Path:
    """A data set of such rows, with a manifest."""
    split = f"{folder.name}-00000"
    entries = []
    for index in range(files):
        start, end = rows * index // files, rows * (index + 1) // files
        path = folder / split / file_name(split, index, "zstd")
        with ShardWriter(path, columns=columns, further=further) as writer:
            if end > start:
                writer.write(typed_rows(first + start, end - start, further, columns=columns))
        entries.append(entry_of_written(path, folder, writer.statistics))
    described = FurtherColumns(carried=tuple(sorted(further)))
    manifest = Manifest(command="test", options={}, files=tuple(entries), tokenizer=TOKENIZER, further=described)
    write_manifest(folder, manifest)
    return folder


def exact_rows(batches: Iterable[pa.RecordBatch], *, one_nan: bool = False) -> list[tuple[Any, ...]]:
    """Rows as tuples of (name, value) that compare by bits: a NaN equals itself, 0.0 is not -0.0; with `one_nan` all
    NaN are equal."""
    rows: list[tuple[Any, ...]] = []
    for batch in batches:
        named = [(name, _by_bits(batch.column(name), one_nan)) for name in batch.schema.names]
        rows.extend(tuple((name, values[row]) for name, values in named) for row in range(batch.num_rows))
    return rows


def _by_bits(column: pa.Array, one_nan: bool) -> list[Any]:
    if pa.types.is_float32(column.type):
        numbers = column.to_numpy(zero_copy_only=False)
        return [b"NaN" if one_nan and np.isnan(number) else number.tobytes() for number in numbers]
    if pa.types.is_list(column.type):
        flat = _by_bits(column.flatten(), one_nan)
        ends = np.cumsum([len(each) for each in column])
        return [tuple(flat[end - len(each) : end]) for each, end in zip(column, ends.tolist(), strict=True)]
    values: list[Any] = column.to_pylist()
    return values


def rows_of_folder(folder: Path) -> list[tuple[Any, ...]]:
    """The rows of all files below a folder, in order, with all their columns."""
    return exact_rows(batch for path in list_shards(folder) for batch in ShardReader(path))


def bag(folder: Path) -> Counter[tuple[Any, ...]]:
    """The rows below a folder, as a multiset."""
    return Counter(rows_of_folder(folder))
