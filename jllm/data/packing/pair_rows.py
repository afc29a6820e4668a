"""Rows of preference pairs: what they must be, and the checksum that ties reference log-probabilities to them.

Documents 2k and 2k + 1 of a row are the chosen and the rejected side of a pair; each has a target, so that no pair is
without an answer. Beside the column `ref_logps` stands `ref_labels`, a checksum of the row it was made of: it travels
with the row through every command, so that numbers of other tokens or labels are found, in whatever order rows come.

Cost: a pass of numpy over a row, and CRC-32 at some GB a second.
"""

import zlib

import numpy as np
from numpy.typing import NDArray

from jllm.data.dataset.columns import IGNORE_INDEX, REF_LABELS, REF_LOGPS, Int32


def row_checksum(ids: Int32, labels: Int32, boundaries: Int32) -> int:
    """A number of 32 bits, signed as columns have them, of a row without its padding."""
    end = int(boundaries[-1])
    found = 0
    for part in (ids[:end], labels[:end], boundaries):
        found = zlib.crc32(np.ascontiguousarray(part, dtype=np.int32).data, found)
    return int(np.uint32(found).astype(np.int32))


def pairs_of(labels: Int32 | None, boundaries: Int32 | None) -> int:
    """How many pairs a row has.

    Raises:
        ValueError: it is none of pairs; why.
    """
    count = 1 if boundaries is None else len(boundaries) - 1
    if labels is None or boundaries is None or count % 2:
        raise ValueError(f"it has {count} documents{' without labels' if labels is None else ''}")
    targets = labels[: boundaries[-1]] != IGNORE_INDEX
    targets[boundaries[:-1][boundaries[:-1] < len(targets)]] = False
    before = np.concatenate([[0], np.cumsum(targets)])[boundaries]
    empty = np.flatnonzero(np.diff(before) == 0)
    if len(empty):
        raise ValueError(f"nothing of its document {int(empty[0])} is trained on")
    return count // 2


def reference_mismatch(
    ids: Int32, labels: Int32, boundaries: Int32, references: NDArray[np.float32] | None, checksum: int | None
) -> str | None:
    """What is wrong with the reference log-probabilities of a row; None where nothing is."""
    if references is None or len(references) != len(boundaries) - 1:
        found = "no" if references is None else str(len(references))
        return f"it has {found} {REF_LOGPS.name} for {len(boundaries) - 1} documents"
    if checksum is None or checksum != row_checksum(ids, labels, boundaries):
        return f"its {REF_LOGPS.name} were made of other tokens or labels ({REF_LABELS.name} differs)"
    if not np.isfinite(references).all():
        return f"a number of its {REF_LOGPS.name} is not finite"
    return None
