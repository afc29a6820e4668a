"""The columns of a shard and their Arrow type, and list columns as numpy arrays."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

INPUT_IDS = "input_ids"
LABELS = "labels"
CU_SEQLENS = "cu_seqlens"
COLUMNS = (INPUT_IDS, LABELS, CU_SEQLENS)
IGNORE_INDEX = -100
"""The label of a token that is not trained on (PyTorch's `ignore_index`)."""

LIST_TYPE = pa.list_(pa.field("element", pa.int32(), nullable=False))

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]


def schema(columns: Sequence[str]) -> pa.Schema:
    """The Arrow schema of a shard with these columns, in the contract's order."""
    return pa.schema([pa.field(name, LIST_TYPE, nullable=False) for name in COLUMNS if name in columns])


def to_list_array(values: Int32, offsets: Int64) -> pa.ListArray:
    """Rows `values[offsets[i]:offsets[i+1]]` as an Arrow list column, without a copy of the values."""
    offsets32, values32 = (part.astype(np.int32, casting="same_kind", copy=False) for part in (offsets, values))
    return pa.ListArray.from_arrays(to_array(offsets32), to_array(values32), type=LIST_TYPE)


def from_list_array(column: pa.ListArray) -> tuple[Int32, Int64]:
    """The inverse of `to_list_array`: values and offsets with `offsets[0] == 0`; zero-copy for a non-null column."""
    offsets = from_array(column.offsets).astype(np.int64)
    values: Int32 = from_array(column.values)[offsets[0] : offsets[-1]]
    return values, offsets - offsets[0]


def to_array(values: NDArray[Any]) -> pa.Array:
    """Numbers as an Arrow array over the same memory; `pa.array` of a numpy array first imports pandas, for half a
    second."""
    numbers = np.ascontiguousarray(values)
    return pa.Array.from_buffers(pa.from_numpy_dtype(numbers.dtype), len(numbers), [None, pa.py_buffer(numbers)])


def from_array(array: pa.Array) -> NDArray[Any]:
    """Numbers as they lie in memory; Arrow's own `to_numpy` imports pandas first, which takes half a second."""
    kind = array.type
    if array.null_count or not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        return array.to_numpy(zero_copy_only=False)  # type: ignore[no-any-return]
    dtype = np.dtype(kind.to_pandas_dtype())
    if not len(array):
        return np.empty(0, dtype=dtype)
    return np.frombuffer(array.buffers()[1], dtype=dtype, count=len(array), offset=dtype.itemsize * array.offset)
