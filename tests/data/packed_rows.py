"""Documents for packers, and the rows that they give."""

import itertools
from typing import Any

import numpy as np
import pyarrow as pa

from jllm.data.packing.documents import Documents


def documents_of(lengths: list[int], labels: bool = False) -> Documents:
    offsets = np.r_[0, np.cumsum(lengths)].astype(np.int64)
    ids = np.arange(offsets[-1], dtype=np.int32)
    return Documents(
        ids=ids, offsets=offsets, labels=np.where(ids % 3 > 0, ids, -100).astype(np.int32) if labels else None
    )


def rows_of(packer: Any, documents: Documents, cuts: list[int]) -> list[dict[str, list[int]]]:
    """Feed documents in pieces, taking the state out and in between them."""
    batches: list[pa.RecordBatch] = []
    places = sorted({0, len(documents), *(cut % (len(documents) + 1) for cut in cuts)})
    for begin, end in itertools.pairwise(places):
        state = packer.state()
        packer.restore({key: value.tolist() if hasattr(value, "tolist") else value for key, value in state.items()})
        batch = packer.feed(documents.slice(begin, end))
        batches += [batch] if batch is not None else []
    batches += list(packer.finish())
    return [row for batch in batches for row in batch.to_pylist()]
