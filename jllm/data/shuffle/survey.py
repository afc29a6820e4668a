"""What a shuffle must know of its input before it reads rows.

Where the rows lie, which columns they have, and how large they are.

Cost: the footers of all files; and the text columns of those whose writer encoded them in fewer bytes than they take.
"""

import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jllm.data.dataset.columns import COLUMNS, CU_SEQLENS, INPUT_IDS, TEXT, Column, ordered
from jllm.data.dataset.further import FurtherColumns, common
from jllm.data.dataset.manifest import DataSet
from jllm.data.dataset.reader import ShardReader
from jllm.data.shuffle.compact import CompactColumn, Range, join_ranges

OFFSET_BYTES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputShard:
    """One input file as the first pass needs it.

    Attributes:
        path: of the file.
        first_row: where its rows start in the data set.
        rows_of_groups: rows of each row group.
        columns: those out of `COLUMNS` that it has.
        further: its further columns.
        elements: of each list of numbers how many it has, at most, and their range.
        text_sizes: of each column of text at most how many bytes.
    """

    path: Path
    first_row: int
    rows_of_groups: tuple[int, ...]
    columns: tuple[str, ...]
    further: FurtherColumns
    elements: dict[str, tuple[int, Range | None]]
    text_sizes: dict[str, int]

    @property
    def rows(self) -> int:
        return sum(self.rows_of_groups)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Survey:
    """The input of a shuffle.

    Attributes:
        shards: its files, in order.
        columns: those out of `COLUMNS` that every row of the output has.
        further: the further columns of the data set.
        packed: what `Compact` makes of all columns.
        packed_size: bytes of all rows in memory, each once: elements, list offsets, and positions.
    """

    shards: tuple[InputShard, ...]
    columns: tuple[str, ...]
    further: FurtherColumns
    packed: tuple[CompactColumn, ...]
    packed_size: int


def survey(data_set: DataSet, *, cores: int) -> Survey:
    """Look through the files of a data set.

    Raises:
        UserError: a file cannot be read.
    """
    with ThreadPoolExecutor(cores) as pool:
        found = list(pool.map(_look_at, data_set.paths))
    shards: list[InputShard] = []
    first_row = 0
    for shard in found:
        shards.append(dataclasses.replace(shard, first_row=first_row))
        first_row += shard.rows
    columns = tuple(name for name in COLUMNS if any(name in shard.columns for shard in shards)) or (INPUT_IDS,)
    names = [entry.path for entry in data_set.manifest.files]
    further = common(dict(zip(names, (shard.further for shard in shards), strict=True)))
    packed = tuple(_packed(each, shards) for each in ordered(columns, further.carried))
    return Survey(
        shards=tuple(shards),
        columns=columns,
        further=further,
        packed=packed,
        packed_size=sum(_size(each, shard) for each in packed for shard in shards),
    )


def _look_at(path: Path) -> InputShard:
    reader = ShardReader(path)
    columns = ordered(reader.columns, reader.further.carried)
    shard = InputShard(
        path=path,
        first_row=0,
        rows_of_groups=tuple(reader.rows_of_groups),
        columns=reader.columns,
        further=reader.further,
        elements={each.name: reader.elements(each.name) for each in columns if each.is_list},
        text_sizes={each.name: reader.text_size(each.name) for each in columns if each.element == TEXT},
    )
    reader.close()
    return shard


def _packed(column: Column, shards: Sequence[InputShard]) -> CompactColumn:
    complete = all(column.name in shard.elements for shard in shards)
    joined = join_ranges([shard.elements[column.name][1] for shard in shards] if complete else [None])
    if column.name == CU_SEQLENS and joined is not None:
        joined = joined[0], joined[1] + 1  # from shifted coordinates to those of the row
    return CompactColumn(column=column, range=joined if column.is_number_list else None)


def _size(packed: CompactColumn, shard: InputShard) -> int:
    column = packed.column
    offsets = shard.rows * OFFSET_BYTES * 3
    if column.element == TEXT:
        return shard.text_sizes[column.name] + offsets
    elements = shard.rows
    if column.is_list:
        elements, _ = shard.elements.get(column.name, shard.elements[INPUT_IDS])
    return elements * packed.bytes + offsets
