"""Rows that others wrote, in the shard contract's terms.

What is brought over: lists that may be null but are not, 64-bit and fixed-size lists, integers of any size whose
values fit int32, and document boundaries that count in shifted coordinates, as some trainers write them: there the
last entry is the row's length - 1, since a row of n tokens makes n - 1 predictions. Everything else is refused with the
file's name and the reason. Where nothing needs to change, nothing is copied.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa

from jllm.data.dataset.columns import LIST_TYPE, from_array, from_list_array, to_list_array
from jllm.errors import UserError


def check_type(field: pa.Field, path: Path | str) -> None:
    """Refuse a column that is not a list of integers.

    Raises:
        UserError: it is something else.
    """
    kind = field.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not (is_list and pa.types.is_integer(kind.value_type)):
        raise UserError(f"{path}: column {field.name} is {kind}; it must be a list of integers")


def list_column(column: pa.Array | pa.ChunkedArray, where: str) -> pa.ListArray:
    """A list column in the contract's type.

    Raises:
        UserError: null rows or elements, or integers beyond int32; `where` says whose.
    """
    array = column
    if isinstance(column, pa.ChunkedArray):
        array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # more elements than one array can address
        raise UserError(f"{where}: more than 2^31 elements in one row group; write it with smaller row groups")
    if array.null_count:
        raise UserError(f"{where}: {array.null_count} rows are null; remove them, or fill them with empty lists")
    if array.type == LIST_TYPE:
        return array
    elements = array.flatten()
    if elements.null_count:
        raise UserError(f"{where}: {elements.null_count} elements are null; remove those rows")
    if pa.types.is_fixed_size_list(array.type):
        offsets = np.arange(len(array) + 1, dtype=np.int64) * array.type.list_size
    else:
        offsets = from_array(array.offsets).astype(np.int64)
        offsets -= offsets[0]
    try:
        values = elements.cast(pa.int32())
    except pa.ArrowInvalid as error:
        raise UserError(f"{where}: {error}") from None
    return to_list_array(from_array(values), offsets)


def boundaries(column: pa.ListArray, ids: pa.ListArray, where: str) -> pa.ListArray:
    """Document boundaries in row coordinates, checked against the rows.

    Rows are in shifted coordinates where every row of the batch ends its boundaries one before its end. A writer of
    row coordinates would do so only if each of its rows had exactly one token of padding.

    Raises:
        UserError: they do not start with 0, do not ascend, or reach beyond their row; `where` says whose.
    """
    values, offsets = from_list_array(column)
    lengths = np.diff(from_list_array(ids)[1])
    if not len(lengths):
        return column
    empty = int((np.diff(offsets) == 0).sum())
    if empty:
        raise UserError(f"{where}: {empty} rows have an empty cu_seqlens; it must start with 0")
    first, last = values[offsets[:-1]], values[offsets[1:] - 1]
    ascending = np.diff(values, prepend=0) >= 0
    ascending[offsets[:-1]] = True  # a row's first entry follows the row before
    if first.any() or not ascending.all():
        raise UserError(f"{where}: cu_seqlens must start with 0 and ascend in every row")
    if (last > lengths).any():
        row = int(np.argmax(last > lengths))
        raise UserError(f"{where}: cu_seqlens of row {row} ends at {last[row]}, beyond its {lengths[row]} tokens")
    if (last != lengths - 1).any():
        return column
    shifted = values.copy()
    shifted[offsets[1:] - 1] += 1
    return to_list_array(shifted, offsets)
