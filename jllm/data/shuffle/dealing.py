"""Which file of a data set goes to which partition, so that all partitions have about as many tokens.

Partition k gets file k, k+n, ... of every set wherever that is even, which it is after a shuffle to a multiple of n
files. Elsewhere each run of n files of a set still goes to n partitions, the larger ones to those that have less so
far, and the files that are left at the ends of the sets go to the emptiest. Pure functions.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jllm.data.dataset.columns import Int64

EVEN = 0.05
"""Partitions are even where the largest and the smallest differ by at most this share of their mean."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dealing:
    """`parts`: of each partition, the places of its files; `note`: what is to be said of their sizes."""

    parts: tuple[tuple[int, ...], ...]
    note: str | None


def deal(files: Sequence[tuple[str, int]], tokens: Sequence[int | None], partitions: int) -> Dealing:
    """Deal files to partitions.

    Args:
        files: data set and number in it of each, in order.
        tokens: of each; None where nobody counted them.
        partitions: how many there are.
    """
    plain = np.array([number % partitions for _, number in files], dtype=np.int64)
    known = [count for count in tokens if count is not None]
    if len(known) < len(files):
        unknown = "some files' tokens are not known, nor whether partitions are even; count them: jllm manifest --force"
        return Dealing(parts=_parts(plain, partitions), note=unknown)
    sizes = np.array(known, dtype=np.int64)
    chosen = plain
    if _spread(plain, sizes, partitions) > EVEN:
        chosen = min(plain, _evened(files, sizes, partitions), key=lambda each: _spread(each, sizes, partitions))
    note = None
    if _spread(chosen, sizes, partitions) > EVEN:
        loads = np.bincount(chosen, sizes, partitions).astype(np.int64)
        note = (
            f"partitions are uneven: from {int(loads.min()):,} to {int(loads.max()):,} tokens, {int(loads.mean()):,} on"
            f" average, as files are dealt whole; shuffle with --num_block {partitions}, or a multiple of it"
        )
    return Dealing(parts=_parts(chosen, partitions), note=note)


def _parts(partition_of: Int64, partitions: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(np.flatnonzero(partition_of == k).tolist()) for k in range(partitions))


def _spread(partition_of: Int64, sizes: Int64, partitions: int) -> float:
    """How far the largest and the smallest partition are apart, as a share of their mean."""
    loads = np.bincount(partition_of, sizes, partitions)
    return float((loads.max() - loads.min()) / max(1.0, loads.mean()))


def _evened(files: Sequence[tuple[str, int]], sizes: Int64, partitions: int) -> Int64:
    """The partition of each file, as the module says."""
    places: dict[str, list[int]] = {}
    for place, (name, _) in enumerate(files):
        places.setdefault(name, []).append(place)
    rounds = [own[at : at + partitions] for own in places.values() for at in range(0, len(own), partitions)]
    whole = [each for each in rounds if len(each) == partitions]
    rests = [each for each in rounds if len(each) < partitions]
    loads = np.zeros(partitions, dtype=np.int64)
    partition_of = np.zeros(len(files), dtype=np.int64)
    for some in [*whole, *sorted(rests, key=lambda rest: -int(sizes[rest].max()))]:
        largest_first = np.array(some)[np.argsort(-sizes[some], kind="stable")]
        emptiest_first = np.argsort(loads, kind="stable")[: len(some)]
        partition_of[largest_first] = emptiest_first
        loads[emptiest_first] += sizes[largest_first]
    return partition_of
