"""Parquet sources: rows with a text or chat column, or with ids.

Guarantees: memory for one row group.
Cost: pyarrow's, on one thread for each source; a dict for each row where rows are parsed.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from jllm.data.sources.chunk import Chunk
from jllm.data.sources.inputs import Source
from jllm.data.sources.records import BadRecord, Records
from jllm.errors import UserError


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
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"-i {source.name}: cannot be read as Parquet: {error}") from None


def refuse_columns(source: Source, wanted: Sequence[str], names: Sequence[str]) -> NoReturn:
    """Raises:
    UserError: none of the columns that are wanted is there.
    """
    there = ", ".join(names[:12]) or "none"
    raise UserError(f"-i {source.name}: no column {' or '.join(wanted)} (columns: {there})")


def chunks(
    source: Source, number: int, start: int, index: int, columns: Sequence[str] | None, size: int
) -> Iterator[Chunk]:
    """Chunks of rows from row `start` on. Rows are numbered from 1 in `Chunk.line`.

    Args:
        number, index: of the source, and of the first chunk in it.
        columns: to read; None reads all.
        size: bytes in a chunk, about.

    Raises:
        UserError: not Parquet, or without the columns that are needed.
    """
    file = open_parquet(source)
    names = file.schema_arrow.names
    wanted = [name for name in names if columns is None or name in columns]
    if columns is not None and not wanted:
        refuse_columns(source, columns, names)
    row = 0
    for group in range(file.metadata.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if row + rows <= start:
            row += rows
            continue
        weight = file.metadata.row_group(group).total_byte_size
        step = max(1, rows * size // max(1, weight))
        table = file.read_row_group(group, columns=wanted, use_threads=False)
        for begin in range(0, rows, step):
            data = table.slice(begin, step)
            end = row + begin + data.num_rows
            if end > start:
                yield Chunk(source=number, index=index, line=row + begin + 1, data=data, end=end, end_line=end + 1)
                index += 1
        row += rows


def parse(rows: Any, line: int) -> Records:
    """The rows of an Arrow table as dicts; `line` is the number of the first.

    A struct has every field of its column, null where its own object had none: such nulls are left out.
    """
    import pyarrow as pa

    try:
        values = rows.to_pylist(maps_as_pydicts="lossy")
    except UnicodeDecodeError as error:
        if rows.num_rows > 1:
            parts = [parse(rows.slice(at, 1), line + at) for at in range(rows.num_rows)]
            return Records(
                values=[value for part in parts for value in part.values],
                lines=[number for part in parts for number in part.lines],
                bad=[bad for part in parts for bad in part.bad],
            )
        bad = BadRecord(kind="not UTF-8", line=line, detail=f"byte {error.start} of a text: {error.reason}")
        return Records(values=[], lines=[], bad=[bad])
    nested = [field.name for field in rows.schema if _has_objects(field.type, pa.types)]
    for value in values if nested else ():
        for name in nested:
            value[name] = _without_nulls(value[name])
    return Records(values=values, lines=[line + i for i in range(len(values))], bad=[])


def _has_objects(kind: Any, types: Any) -> bool:
    """Whether values of an Arrow type hold structs or maps."""
    if types.is_struct(kind) or types.is_map(kind):
        return True
    lists = (types.is_list, types.is_large_list, types.is_fixed_size_list)
    return any(is_kind(kind) for is_kind in lists) and _has_objects(kind.value_type, types)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
