"""The columns of a shard: names, types, order; Arrow columns as numpy arrays and back.

Three columns have a meaning of their own: `input_ids`, `labels` and `cu_seqlens`, all of them `list<int32>`. Further
columns are typed (`Column`): int32, float32 or text, one a row or a list of them. Neither a row nor an element is null.
"""

import dataclasses
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

INT32, FLOAT32, TEXT = "int32", "float32", "text"
ELEMENTS = {INT32: pa.int32(), FLOAT32: pa.float32(), TEXT: pa.string()}
"""What a column or the elements of its lists can be."""

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Numbers = NDArray[np.int32] | NDArray[np.float32]


def list_of(element: str) -> pa.DataType:
    """The Arrow type of a list column."""
    return pa.list_(pa.field("element", ELEMENTS[element], nullable=False))


LIST_TYPE = list_of(INT32)


@dataclasses.dataclass(frozen=True, kw_only=True, order=True)
class Column:
    """A column of a shard: int32, float32 or text (`element`), one a row or, as `is_list`, any number of them."""

    name: str
    element: str = INT32
    is_list: bool = True

    def __post_init__(self) -> None:
        assert self.element in ELEMENTS

    @classmethod
    def named(cls, name: str, type_name: str) -> "Column":
        """The inverse of `type_name`.

        Raises:
            ValueError: there is no such type.
        """
        for element in ELEMENTS:
            for is_list in (True, False):
                column = cls(name=name, element=element, is_list=is_list)
                if column.type_name == type_name:
                    return column
        raise ValueError(f"column {name} has the unknown type {type_name!r}")

    @property
    def type_name(self) -> str:
        """The type for people and manifests: `list<float32>`, `text`, ..."""
        return f"list<{self.element}>" if self.is_list else self.element

    @property
    def type(self) -> pa.DataType:
        return list_of(self.element) if self.is_list else ELEMENTS[self.element]

    @property
    def is_number_list(self) -> bool:
        """Whether its elements are numbers of 4 bytes in lists, as token ids are."""
        return self.is_list and self.element != TEXT


CONTROL_CLASS = Column(name="control_class")
"""The further column that control adapters know: of each token 1, -1, or 0, where they are off."""
REF_LOGPS = Column(name="ref_logps", element=FLOAT32)
"""The further column of preference pairs: of each document the log-probability of its answer under the reference."""
REF_LABELS = Column(name="ref_labels", is_list=False)
"""The further column beside it: a checksum of the row that the numbers were made of."""
SOURCE_TAG = Column(name="source", element=TEXT, is_list=False)
"""The further column that mixing knows: the tag of a row's source. Null and empty both mean that it has none."""


def ordered(columns: Sequence[str], further: Sequence[Column] = ()) -> tuple[Column, ...]:
    """The columns of a shard in the order in which they are written: the three of the contract, then by name."""
    assert set(columns) <= set(COLUMNS)
    return (*(Column(name=name) for name in COLUMNS if name in columns), *sorted(further))


def schema(columns: Sequence[str], further: Sequence[Column] = ()) -> pa.Schema:
    """The Arrow schema of a shard with these columns of the contract and these further ones."""
    return pa.schema([pa.field(each.name, each.type, nullable=False) for each in ordered(columns, further)])


def conform(batch: pa.RecordBatch, columns: Sequence[str], further: Sequence[Column] = ()) -> pa.RecordBatch:
    """The batch with exactly these columns: an absent `labels` trains on everything, an absent `cu_seqlens` is one
    document without padding. Further columns must be there."""
    wanted = schema(columns, further)
    if batch.schema.names == wanted.names:
        return batch
    ids, offsets = from_list_array(batch.column(INPUT_IDS))
    arrays = []
    for name in wanted.names:
        if name in batch.schema.names:
            arrays.append(batch.column(name))
        elif name == LABELS:
            arrays.append(to_list_array(ids, offsets))
        else:
            assert name == CU_SEQLENS
            boundaries = np.zeros((batch.num_rows, 2), np.int32)
            boundaries[:, 1] = np.diff(offsets)
            arrays.append(to_list_array(boundaries.ravel(), np.arange(0, 2 * batch.num_rows + 1, 2)))
    return pa.RecordBatch.from_arrays(arrays, schema=wanted)


def to_list_array(values: NDArray[Any], offsets: Int64) -> pa.ListArray:
    """Rows `values[offsets[i]:offsets[i+1]]` as an Arrow list column of int32, or of float32 where `values` are.

    The values are not copied.
    """
    element = FLOAT32 if values.dtype == np.float32 else INT32
    same = values.astype(np.dtype(element), casting="same_kind", copy=False)
    return join_lists(to_array(same), offsets)


def join_lists(elements: pa.Array, offsets: Int64) -> pa.ListArray:
    """The same for elements that are an Arrow array of one of `ELEMENTS`."""
    element = next(name for name, kind in ELEMENTS.items() if kind == elements.type)
    offsets32 = offsets.astype(np.int32, casting="same_kind", copy=False)
    return pa.ListArray.from_arrays(to_array(offsets32), elements, type=list_of(element))


def from_list_array(column: pa.ListArray) -> tuple[Int32, Int64]:
    """The inverse of `to_list_array`: values and offsets with `offsets[0] == 0`; zero-copy for a non-null column."""
    elements, offsets = split_lists(column)
    values: Int32 = from_array(elements)
    return values, offsets


def split_lists(column: pa.ListArray) -> tuple[pa.Array, Int64]:
    """The inverse of `join_lists`: the elements of all rows, and offsets with `offsets[0] == 0`."""
    offsets = from_array(column.offsets).astype(np.int64)
    first, last = int(offsets[0]), int(offsets[-1])
    return column.values.slice(first, last - first), offsets - first


def text_bytes(column: pa.StringArray) -> tuple[NDArray[np.uint8], Int64]:
    """The UTF-8 of all texts of a non-null column, and where each begins, and the last one ends, in it."""
    _, places, data = column.buffers()
    if not len(column) or places is None:
        return np.empty(0, np.uint8), np.zeros(len(column) + 1, np.int64)
    offsets = np.frombuffer(places, np.int32, count=column.offset + len(column) + 1)[column.offset :].astype(np.int64)
    content = np.empty(0, np.uint8) if data is None else np.frombuffer(data, np.uint8)
    return content[offsets[0] : offsets[-1]], offsets - offsets[0]


def bytes_before(column: pa.Array) -> Int64:
    """[rows + 1] bytes that the rows before each take, 4 for a number or the length of a text."""
    if pa.types.is_list(column.type):
        elements, offsets = split_lists(column)
        return bytes_before(elements)[offsets]
    numbers: Int64 = np.arange(0, 4 * len(column) + 1, 4, dtype=np.int64)
    return numbers + text_bytes(column)[1] if pa.types.is_string(column.type) else numbers


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
