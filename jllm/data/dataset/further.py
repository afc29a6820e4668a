"""Further columns: which travel with their rows, which are left out, and why.

One rule wherever rows are rewritten (shuffle, mixing, Spark). A column travels where every file has it, as integers,
floating-point numbers or text, one a row or in lists. A column of another type (struct, binary, date, ...), one that
only some files have, and one whose type differs between files is left out; it is named in a warning and in the
manifest. Nothing is filled in for a missing value: it could not be told from one that was there.
"""

import dataclasses
from collections.abc import Mapping

import pyarrow as pa

from jllm.data.dataset.columns import COLUMNS, FLOAT32, INT32, TEXT, Column

_SHOWN = 60


@dataclasses.dataclass(frozen=True, kw_only=True)
class FurtherColumns:
    """The further columns of a file or a data set.

    Attributes:
        carried: those that travel with the rows, by name.
        left_out: name → reason of those that do not.
        rounded: names of those in `carried` that are stored as 64-bit numbers and become float32.
    """

    carried: tuple[Column, ...] = ()
    left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)
    rounded: frozenset[str] = dataclasses.field(default=frozenset(), compare=False)

    @property
    def types(self) -> dict[str, str]:
        """Name → type of the columns that travel, for the manifest."""
        return {column.name: column.type_name for column in self.carried}

    def warnings(self) -> list[str]:
        """What a user must know before rows are rewritten, a line for each column."""
        lines = [f"column {name} is left out: {reason}" for name, reason in sorted(self.left_out.items())]
        return lines + [f"column {name} is double: it is rounded to float32" for name in sorted(self.rounded)]


def is_list(kind: pa.DataType) -> bool:
    """Whether an Arrow type is a list of some kind."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def column_of(field: pa.Field) -> Column | None:
    """What a column of any file is in a shard; None where it is of no type that travels."""
    element = _value_type(field.type.value_type if is_list(field.type) else field.type)
    if pa.types.is_integer(element):
        name = INT32
    elif pa.types.is_floating(element):
        name = FLOAT32
    elif pa.types.is_string(element) or pa.types.is_large_string(element) or pa.types.is_string_view(element):
        name = TEXT
    else:
        return None
    return Column(name=field.name, element=name, is_list=is_list(field.type))


def _value_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def further_of(schema: pa.Schema) -> FurtherColumns:
    """The further columns of a file with this schema."""
    carried, left_out, rounded = [], {}, set()
    for field in schema:
        if field.name in COLUMNS:
            continue
        column = column_of(field)
        if schema.names.count(field.name) > 1:
            left_out[field.name] = "several columns have this name"
        elif column is None:
            kind = " ".join(str(field.type).split())
            short = kind if len(kind) <= _SHOWN else f"{kind[:_SHOWN]}..."
            left_out[field.name] = f"{short} is no type that shards have (int32, float32, text, lists of them)"
        else:
            carried.append(column)
            element = field.type.value_type if is_list(field.type) else field.type
            if pa.types.is_float64(_value_type(element)):
                rounded.add(field.name)
    return FurtherColumns(carried=tuple(sorted(carried)), left_out=left_out, rounded=frozenset(rounded))


def common(found: Mapping[str, FurtherColumns]) -> FurtherColumns:
    """The further columns of several files or data sets as one; `found` has them by name, for the reasons."""
    left_out: dict[str, str] = {}
    columns: dict[str, Column] = {}
    first: dict[str, str] = {}
    for place, each in found.items():
        for name, reason in each.left_out.items():
            left_out.setdefault(name, reason)
        for column in each.carried:
            known = columns.setdefault(column.name, column)
            first.setdefault(column.name, place)
            if known != column:
                types = f"{known.type_name} in {first[column.name]}, {column.type_name} in {place}"
                left_out.setdefault(column.name, f"it is {types}")
    for name in columns:
        for place, each in found.items():
            if name not in left_out and name not in each.types:
                left_out[name] = f"it is in {first[name]}, not in {place}"
    carried = tuple(sorted(column for name, column in columns.items() if name not in left_out))
    rounded = frozenset[str]().union(*(each.rounded for each in found.values())) & {column.name for column in carried}
    return FurtherColumns(carried=carried, left_out=left_out, rounded=rounded)
