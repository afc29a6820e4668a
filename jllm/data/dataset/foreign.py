"""Rows that others wrote, in the shard contract's terms.

What is brought over: lists that may be null but are not, large and fixed-size lists, integers of any size whose
values fit int32, floating-point numbers of 16 and 64 bits (the latter rounded to float32; one beyond its range is
refused), text in any of Arrow's layouts, dictionaries of all these, and document boundaries that count in shifted
coordinates, as some trainers write them: there the last entry is the row's length - 1, since a row of n tokens makes
n - 1 predictions. Everything else is refused with the file's name and the reason. Where nothing needs to change,
nothing is copied.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa

from jllm.data.dataset.columns import (
    ELEMENTS,
    FLOAT32,
    LIST_TYPE,
    SOURCE_TAG,
    TEXT,
    Column,
    Int64,
    from_array,
    from_list_array,
    join_lists,
    to_array,
    to_list_array,
)
from jllm.data.dataset.further import is_list
from jllm.errors import UserError


def check_type(field: pa.Field, path: Path | str) -> None:
    """Refuse a column that is not a list of integers.

    Raises:
        UserError: it is something else.
    """
    kind = field.type
    if not (is_list(kind) and pa.types.is_integer(kind.value_type)):
        raise UserError(f"{path}: column {field.name} is {kind}; it must be a list of integers")


def list_column(column: pa.Array | pa.ChunkedArray, where: str) -> pa.ListArray:
    """A list column of integers in the contract's type.

    Raises:
        UserError: null rows or elements, or integers beyond int32; `where` says whose.
    """
    array = _one_array(column, where)
    if array.null_count:
        raise UserError(f"{where}: {array.null_count} rows are null; remove them, or fill them with empty lists")
    if array.type == LIST_TYPE:
        return array
    elements, offsets = _flat(array)
    if elements.null_count:
        raise UserError(f"{where}: {elements.null_count} elements are null; remove those rows")
    try:
        values = elements.cast(pa.int32())
    except pa.ArrowInvalid as error:
        raise UserError(f"{where}: {error}") from None
    return to_list_array(from_array(values), offsets)


def further_column(array: pa.Array | pa.ChunkedArray, column: Column, where: str, *, first_row: int = 0) -> pa.Array:
    """A further column in the contract's type.

    Args:
        array: the rows as they were read.
        column: what it must become, out of what `column_of` says of the file.
        where: whose it is, for messages.
        first_row: the number of its first row, for messages.

    Raises:
        UserError: null rows or elements, numbers that do not fit, or text that is not UTF-8; the message has the row.
    """
    rows = _decoded(_one_array(array, where))
    if rows.null_count and column == SOURCE_TAG:
        rows = rows.fill_null("")
    if rows.null_count:
        raise _refused(where, first_row + _first_null(rows), "is null; fill it with a value, or leave the column out")
    offsets = None
    elements = rows
    if column.is_list:
        if rows.type == column.type and column.element != TEXT:
            return rows
        elements, offsets = _flat(rows)
        elements = _decoded(elements)

    def row_of(element: int) -> int:
        row = element if offsets is None else int(np.searchsorted(offsets, element, side="right")) - 1
        return first_row + row

    if elements.null_count:
        raise _refused(where, row_of(_first_null(elements)), "has a null in its list; fill it, or leave the column out")
    try:
        if column.element == FLOAT32:
            numbers = from_array(elements)
            with np.errstate(over="ignore"):
                narrow = numbers.astype(np.float32, copy=False)
            beyond = np.flatnonzero(np.isinf(narrow) & ~np.isinf(numbers))
            if len(beyond):
                raise _refused(where, row_of(int(beyond[0])), f"has {numbers[beyond[0]]}, which is beyond float32")
            flat = to_array(narrow)
        else:
            flat = elements.cast(ELEMENTS[column.element])
        flat.validate(full=True)
    except pa.ArrowInvalid as error:
        rows_named = f"rows {first_row} to {first_row + len(rows) - 1}"
        raise UserError(f"{where}: {rows_named}: {str(error).splitlines()[0]}") from None
    return flat if offsets is None else join_lists(flat, offsets)


def _refused(where: str, row: int, reason: str) -> UserError:
    return UserError(f"{where}: row {row} {reason}")


def _first_null(array: pa.Array) -> int:
    return int(np.argmax(array.is_null().to_numpy(zero_copy_only=False)))


def _decoded(array: pa.Array) -> pa.Array:
    """What a dictionary stands for; its null may lie among its values, where the array does not count it."""
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def _one_array(column: pa.Array | pa.ChunkedArray, where: str) -> pa.Array:
    array = column
    if isinstance(column, pa.ChunkedArray):
        array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # more elements than one array can address
        raise UserError(f"{where}: more than 2^31 elements in one row group; write it with smaller row groups")
    return array


def _flat(lists: pa.Array) -> tuple[pa.Array, Int64]:
    """The elements of lists of any kind, none of them null, and where each list begins, and the last one ends."""
    if pa.types.is_fixed_size_list(lists.type):
        return lists.flatten(), np.arange(len(lists) + 1, dtype=np.int64) * lists.type.list_size
    offsets = from_array(lists.offsets).astype(np.int64)
    return lists.flatten(), offsets - offsets[0]


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
