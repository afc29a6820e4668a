"""Documents held out for evaluation: which ones, and where they go.

A document is held out where a hash of its ids and the seed falls below the fraction. So the choice depends on nothing
but the document itself: not on its place, the other documents, the number of workers, or how often a run was killed;
and equal documents, of which real text is full, are never on both sides.

The data set of the held-out documents is `_eval/<name>` beside the other one: Spark, pyarrow and every command of ours
pass over names that start with `_`, so that what takes all sets of a folder never trains on it.

Cost: a few passes of numpy over the ids.
"""

import dataclasses
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from jllm.data.packing.documents import Documents

FOLDER = "_eval"
_STRETCH = 1 << 15  # small enough to stay in the cache
_ODD = tuple(np.uint64(value) for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))

UInt64 = NDArray[np.uint64]


def default_folder(output: Path) -> Path:
    """Where the held-out documents of the data set `output` go."""
    named = output if output.name not in ("", "..") else output.resolve()
    return named.parent / FOLDER / named.name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Holdout:
    """Which documents go to which data set of a run.

    Attributes:
        fraction: of the documents is held out; None where there is no such data set.
        seed: decides with a document's ids.
    """

    fraction: float | None
    seed: int

    def held_out(self, documents: Documents) -> NDArray[np.bool_] | None:
        """Which of the documents are held out; None where there is no data set for them."""
        return None if self.fraction is None else held_out(documents, self.fraction, self.seed)


def held_out(documents: Documents, fraction: float, seed: int) -> NDArray[np.bool_]:
    """Which of the documents are held out: about `fraction` of all different ones."""
    return document_hashes(documents, seed) < np.uint64(int(fraction * 2.0**64))


def document_hashes(documents: Documents, seed: int) -> UInt64:
    """[N] a number for each document that looks random, by its ids and the seed alone."""
    return _mixed(_keys(documents) ^ _mixed(np.array([seed % 2**64], dtype=np.uint64)))


def _keys(documents: Documents) -> UInt64:
    """A number for each document that any change of its ids or their order changes: a sum over neighbouring ids."""
    ids, offsets = documents.ids, documents.offsets
    sums = np.zeros(len(offsets), dtype=np.uint64)  # over all ids before each offset; they wrap around, as they may
    total = np.uint64(0)
    for at in range(0, len(ids), _STRETCH):
        pairs = ids[at : at + _STRETCH].astype(np.uint64)
        before = np.empty_like(pairs)
        before[0], before[1:] = ids[at - 1] if at else 0, pairs[:-1]
        low, high, end = np.searchsorted(offsets, [at, at + len(pairs), at + len(pairs) + 1])
        before[offsets[low:high] - at] = 1 << 32  # what no id is: nothing stands before the first
        pairs *= _ODD[0]
        pairs += before
        pairs ^= pairs >> np.uint64(32)
        pairs *= _ODD[1]
        pairs ^= pairs >> np.uint64(29)
        running = np.empty(len(pairs) + 1, dtype=np.uint64)
        running[0] = total
        np.cumsum(pairs, out=running[1:])
        running[1:] += total
        sums[low:end] = running[offsets[low:end] - at]
        total = running[-1]
    return sums[1:] - sums[:-1]


def _mixed(values: UInt64) -> UInt64:
    """Each number to one that looks random (the finalizer of splitmix64)."""
    values = values + _ODD[0]
    values ^= values >> np.uint64(30)
    values *= _ODD[1]
    values ^= values >> np.uint64(27)
    values *= _ODD[2]
    values ^= values >> np.uint64(31)
    return values
