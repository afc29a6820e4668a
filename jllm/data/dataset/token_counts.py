"""How many tokens rows have, and how many of them are trained on."""

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
