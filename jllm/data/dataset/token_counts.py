"""How many tokens rows have, and how many of them are trained on."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from jllm.data.dataset.columns import CU_SEQLENS, IGNORE_INDEX, INPUT_IDS, LABELS, Int64, from_list_array


def real_lengths(batch: pa.RecordBatch) -> Int64:
    """The number of real tokens of each row: the last of `cu_seqlens`, or the row's length."""
    if CU_SEQLENS in batch.schema.names:
        values, offsets = from_list_array(batch.column(CU_SEQLENS))
        return values[offsets[1:] - 1].astype(np.int64)
    _, offsets = from_list_array(batch.column(INPUT_IDS))
    return np.diff(offsets)


def count_trained(batch: pa.RecordBatch) -> int:
    """The number of predicted tokens: real, label not -100, and neither the row's nor a document's first token."""
    ids, offsets = from_list_array(batch.column(INPUT_IDS))
    trained = np.ones(len(ids), dtype=bool)
    if LABELS in batch.schema.names:
        labels, _ = from_list_array(batch.column(LABELS))
        trained &= labels != IGNORE_INDEX
    starts, ends = offsets[:-1], offsets[1:]
    trained[starts[ends > starts]] = False
    if CU_SEQLENS in batch.schema.names:
        boundaries, cu_offsets = from_list_array(batch.column(CU_SEQLENS))
        row_of = np.repeat(np.arange(len(starts)), np.diff(cu_offsets))
        position = boundaries + starts[row_of]
        trained[position[boundaries < (ends - starts)[row_of]]] = False
        real_ends = starts + boundaries[cu_offsets[1:] - 1]
        for start, end in zip(real_ends[real_ends < ends], ends[real_ends < ends], strict=True):
            trained[start:end] = False
    return int(np.count_nonzero(trained))


def length_bucket(lengths: Any) -> Any:
    """Numbers whose order is that of the lengths, and of which there are few."""
    coarse = 256 + np.ceil((np.log2(np.maximum(lengths, 1)) - 8) * 32)
    return np.where(lengths <= 256, lengths, coarse).astype(np.int64)


def quantile_length(buckets: Mapping[int, int], share: float) -> int:
    """The length that this share of what was counted by `length_bucket` does not exceed, within 3 %."""
    wanted, seen = share * sum(buckets.values()), 0
    for bucket in sorted(buckets):
        seen += buckets[bucket]
        if seen >= wanted:
            return bucket if bucket <= 256 else int(2 ** ((bucket - 256) / 32 + 8))
    return 0
