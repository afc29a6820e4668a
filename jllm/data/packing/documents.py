"""Documents of token ids: many in one array.

Cost: numpy over whole arrays, no Python object for a token.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jllm.data.dataset.columns import Int32, Int64

LONG = 4096
"""Tokens of documents, in the mean, that are worth copying one by one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Documents:
    """Documents in order: document i is `ids[offsets[i]:offsets[i+1]]`.

    `labels` are the ids, or -100 where a token is not trained on; None where all are. `classes` are control classes,
    one a document; None where nobody asked for them. `cuts` say of preference pairs, each of them one document here,
    where the rejected conversation begins in it.
    """

    ids: Int32
    offsets: Int64
    labels: Int32 | None = None
    classes: NDArray[np.int8] | None = None
    cuts: Int64 | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Int64:
        return np.diff(self.offsets)

    def slice(self, start: int, end: int) -> "Documents":
        """Documents `start` to `end`, without a copy of the ids."""
        low, high = int(self.offsets[start]), int(self.offsets[end])
        return Documents(
            ids=self.ids[low:high],
            offsets=self.offsets[start : end + 1] - low,
            labels=None if self.labels is None else self.labels[low:high],
            classes=None if self.classes is None else self.classes[start:end],
            cuts=None if self.cuts is None else self.cuts[start:end],
        )

    def take(self, chosen: Int64) -> "Documents":
        """The documents with these numbers, in this order."""
        starts, lengths = self.offsets[:-1][chosen], self.lengths[chosen]
        index, offsets = spans(starts, lengths)
        return Documents(
            ids=self.ids[index],
            offsets=offsets,
            labels=None if self.labels is None else self.labels[index],
            classes=None if self.classes is None else self.classes[chosen],
            cuts=None if self.cuts is None else self.cuts[chosen],
        )

    def in_pairs(self) -> "Documents":
        """Documents 2k and 2k + 1 as one, with the place where the second begins."""
        assert len(self) % 2 == 0
        return dataclasses.replace(self, offsets=self.offsets[::2], cuts=self.lengths[::2])


def concatenated(parts: Sequence[NDArray[Any] | None]) -> NDArray[Any] | None:
    """What each of several parts has of something, one behind the other; None where none has it."""
    found = [part for part in parts if part is not None]
    assert not found or len(found) == len(parts), "all have it, or none"
    return np.concatenate(found) if found else None


def spans(starts: Int64, lengths: Int64) -> tuple[Int64, Int64]:
    """The indices `starts[i] ... starts[i]+lengths[i]-1` of all spans in a row, and the offsets of each span in
    them."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    index = np.arange(offsets[-1], dtype=np.int64) + np.repeat(starts - offsets[:-1], lengths)
    return index, offsets


def with_affixes(values: Int32, offsets: Int64, prefix: Int32, suffix: Int32) -> tuple[Int32, Int64]:
    """Each span `values[offsets[i]:offsets[i+1]]` with `prefix` before and `suffix` behind it."""
    extra = len(prefix) + len(suffix)
    if extra == 0:
        return values, offsets
    count = len(offsets) - 1
    moved = offsets + extra * np.arange(count + 1)
    result = np.empty(moved[-1], dtype=np.int32)
    if len(values) > LONG * count:
        spans = zip(itertools.pairwise(offsets.tolist()), itertools.pairwise(moved.tolist()), strict=True)
        for (start, end), (first, last) in spans:
            result[first : first + len(prefix)] = prefix
            result[first + len(prefix) : last - len(suffix)] = values[start:end]
            result[last - len(suffix) : last] = suffix
        return result, moved
    own = np.ones(moved[-1], dtype=bool)
    for position, item in enumerate(prefix):
        result[moved[:-1] + position] = item
        own[moved[:-1] + position] = False
    for position, item in enumerate(suffix):
        result[moved[1:] - len(suffix) + position] = item
        own[moved[1:] - len(suffix) + position] = False
    result[own] = values
    return result, moved
