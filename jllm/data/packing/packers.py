"""Documents to rows.

A packer is fed documents in order and gives rows as Arrow batches. Its state between two feeds is small and is plain
data, so that a run can stop and go on:

* `StackPacker` (`--stack`): row k of a split is `stream[k·(L-1) : k·(L-1)+L]` of the split's token stream, so that
  every token but the first is predicted exactly once. Worked example, L = 4, documents `a b c` and `d e f g`:

      stream   a b c d e f g
      row 0    a b c d              cu_seqlens 0 3 4
      row 1          d e f g        cu_seqlens 0 4

* `WindowPacker`: each document alone, in windows of at most L tokens that overlap by one token, or by more with a
  shorter stride.

Cost: numpy over whole chunks, no Python object per token or per row.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from jllm.data.dataset.columns import Column
from jllm.data.dataset.shards import CU_SEQLENS, IGNORE_INDEX, INPUT_IDS, LABELS, Int32, Int64, schema, to_list_array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stored:
    """Where documents lie on disk.

    Attributes:
        path: of the file.
        ids, labels: the byte at which all ids and all labels in the file begin; None where there are no labels.
        starts: number of each document's first token in the file.
    """

    path: str
    ids: int
    labels: int | None
    starts: Int64

    def take(self, chosen: Int64 | slice) -> "Stored":
        return dataclasses.replace(self, starts=self.starts[chosen])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Documents:
    """Documents in order: document i is `ids[offsets[i]:offsets[i+1]]`.

    `labels` are the ids, or -100 where a token is not trained on; None where all are. `stored` says where the same ids
    and labels lie on disk. `classes` are control classes, one a document; None where nobody asked for them. `cuts` say
    of preference pairs, each of them one document here, where the rejected conversation begins in it.
    """

    ids: Int32
    offsets: Int64
    labels: Int32 | None = None
    stored: Stored | None = None
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
            stored=self.stored and self.stored.take(slice(start, end)),
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
            stored=self.stored and self.stored.take(chosen),
            classes=None if self.classes is None else self.classes[chosen],
            cuts=None if self.cuts is None else self.cuts[chosen],
        )

    def in_pairs(self) -> "Documents":
        """Documents 2k and 2k + 1 as one, with the place where the second begins."""
        assert len(self) % 2 == 0
        return dataclasses.replace(self, offsets=self.offsets[::2], cuts=self.lengths[::2])


def spans(starts: Int64, lengths: Int64) -> tuple[Int64, Int64]:
    """The indices `starts[i] ... starts[i]+lengths[i]-1` of all spans in a row, and the offsets of each span in
    them."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    index = np.arange(offsets[-1], dtype=np.int64) + np.repeat(starts - offsets[:-1], lengths)
    return index, offsets


class Packer(Protocol):
    """Turns documents into rows; one packer for each split.

    `columns` are those of the contract that its rows have, `further` the others. `whole` packers give no row before
    `finish`, and need all documents of the split for it.
    """

    whole: bool
    columns: tuple[str, ...]
    further: tuple[Column, ...]

    def feed(self, documents: Documents) -> pa.RecordBatch | None:
        """The rows that these documents complete."""
        ...

    def finish(self) -> Iterator[pa.RecordBatch]:
        """The rows that are left when the split ends."""
        ...

    def state(self) -> dict[str, Any]:
        """What was fed and is not yet in a row; for `restore`."""
        ...

    def restore(self, state: dict[str, Any]) -> None: ...


class WithoutRest:
    """A packer that makes all rows of a document when it is fed: nothing is left for later."""

    whole = False
    further: tuple[Column, ...] = ()

    def finish(self) -> Iterator[pa.RecordBatch]:
        return iter(())

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        pass


class StackPacker:
    """All documents in one stream, cut into rows of `length` tokens that overlap by one token.

    Args:
        length: tokens in a row.
        labels: give the rows labels, because some tokens are not trained on.
        prefix: ids that every row starts with; they are not trained on, and take room from the row.
        drop_tail: drop the last row of a split where it is shorter than the others.
    """

    whole = False
    further: tuple[Column, ...] = ()

    def __init__(
        self, length: int, *, labels: bool = False, prefix: tuple[int, ...] = (), drop_tail: bool = False
    ) -> None:
        self.length = length
        self.prefix = np.array(prefix, dtype=np.int32)
        self.step = length - len(prefix) - 1
        self.drop_tail = drop_tail
        self.labels = labels or bool(prefix)
        self.columns: tuple[str, ...] = (INPUT_IDS, LABELS, CU_SEQLENS) if self.labels else (INPUT_IDS, CU_SEQLENS)
        # The stream from the first token of the next row on. That token is already in the row before it, if there is
        # one.
        self._ids = np.empty(0, dtype=np.int32)
        self._labels = np.empty(0, dtype=np.int32)
        self._starts = np.empty(0, dtype=np.int64)
        self._begun = False

    def feed(self, documents: Documents) -> pa.RecordBatch | None:
        self._starts = np.concatenate([self._starts, documents.offsets[:-1] + len(self._ids)])
        labels = documents.ids if documents.labels is None else documents.labels
        rows = (len(self._ids) + len(documents.ids) - 1) // self.step
        if rows > 0:
            return self._take(rows, self.step + 1, documents.ids, labels)
        self._ids = np.concatenate([self._ids, documents.ids])
        if self.labels:
            self._labels = np.concatenate([self._labels, labels])
        return None

    def finish(self) -> Iterator[pa.RecordBatch]:
        left = len(self._ids)
        wanted = left > 1 or (left == 1 and not self._begun)
        if wanted and not self.drop_tail:
            nothing = self._ids[:0]
            yield self._take(1, left, nothing, nothing)

    def _take(self, rows: int, width: int, ids: Int32, labels: Int32) -> pa.RecordBatch:
        """The next `rows` rows, of `width` stream tokens each; `ids` and `labels` continue the stream."""
        values, self._ids = self._rows_of(self._ids, ids, rows, width, self.prefix)
        full = width + len(self.prefix)
        columns = [to_list_array(values, np.arange(rows + 1, dtype=np.int64) * full)]
        if self.labels:
            untrained = np.full(len(self.prefix), IGNORE_INDEX, dtype=np.int32)
            marked, self._labels = self._rows_of(self._labels, labels, rows, width, untrained)
            if len(self.prefix):
                # After a prefix the row's first token would be a target: it is the last target of the row before it.
                marked.reshape(rows, full)[:, len(self.prefix)] = IGNORE_INDEX
            columns.append(to_list_array(marked, np.arange(rows + 1, dtype=np.int64) * full))
        columns.append(self._boundaries(rows, full))
        self._starts = self._starts[self._starts >= rows * self.step] - rows * self.step
        self._begun = True
        return pa.RecordBatch.from_arrays(columns, schema=schema(self.columns))

    def _rows_of(self, held: Int32, new: Int32, rows: int, width: int, prefix: Int32) -> tuple[Int32, Int32]:
        """The values of the next rows of a stream that is partly held and partly new; and what is held after them.

        Rows that lie in the new part alone are copied once, straight from it.
        """
        begin = len(prefix)
        result = np.empty((rows, begin + width), dtype=np.int32)
        result[:, :begin] = prefix
        seam = min(rows, -(-len(held) // self.step))  # rows that begin in the held part
        together = np.concatenate([held, new[: max(0, (seam - 1) * self.step + width - len(held))]])
        for row in range(seam):
            result[row, begin:] = together[row * self.step : row * self.step + width]
        if rows > seam:
            windows = np.lib.stride_tricks.sliding_window_view(new[seam * self.step - len(held) :], width)
            result[seam:, begin:] = windows[:: self.step][: rows - seam]
        used = rows * self.step - len(held)
        rest = new[used:].copy() if used >= 0 else np.concatenate([held[used:], new])
        return result.reshape(-1), rest

    def _boundaries(self, rows: int, full: int) -> pa.ListArray:
        # A document that starts at stream position s > 0 starts in row (s-1) // step, at 1 ... step: a start on the
        # token that two rows share is the last token of the one and opens the other.
        starts = self._starts[self._starts > 0] - 1
        row = starts // self.step
        row, position = row[row < rows], (starts % self.step + 1 + len(self.prefix))[row < rows]
        offsets = np.zeros(rows + 1, dtype=np.int64)
        np.cumsum(np.bincount(row, minlength=rows) + 2, out=offsets[1:])
        values = np.zeros(offsets[-1], dtype=np.int32)
        values[np.arange(len(row)) + 2 * row + 1] = position
        values[offsets[1:] - 1] = full
        return to_list_array(values, offsets)

    def state(self) -> dict[str, Any]:
        return {"ids": self._ids, "labels": self._labels, "starts": self._starts, "begun": self._begun}

    def restore(self, state: dict[str, Any]) -> None:
        self._ids = np.array(state["ids"], dtype=np.int32)
        self._labels = np.array(state["labels"], dtype=np.int32)
        self._starts = np.array(state["starts"], dtype=np.int64)
        self._begun = bool(state["begun"])


class WindowPacker(WithoutRest):
    """Each document alone: one row where it fits, else windows.

    Args:
        length: tokens in a row.
        stride: a window starts this many tokens after the one before it; by default `length - 1`, so that windows
            overlap by one token and each token is predicted once.
        labels, prefix, drop_tail: as for `StackPacker`; a tail is the last, shorter window of a document cut in
        several.
    """

    def __init__(
        self,
        length: int,
        *,
        stride: int | None = None,
        labels: bool = False,
        prefix: tuple[int, ...] = (),
        drop_tail: bool = False,
    ) -> None:
        self.room = length - len(prefix)
        self.stride = stride or self.room - 1
        self.prefix = np.array(prefix, dtype=np.int32)
        self.drop_tail = drop_tail
        self.labels = labels or bool(prefix)
        self.columns: tuple[str, ...] = (INPUT_IDS, LABELS) if self.labels else (INPUT_IDS,)

    def feed(self, documents: Documents) -> pa.RecordBatch | None:
        lengths = documents.lengths
        windows = 1 + np.maximum(0, -(-(lengths - self.room) // self.stride))
        document = np.repeat(np.arange(len(documents)), windows)
        first = np.cumsum(windows) - windows
        begin = (np.arange(len(document)) - first[document]) * self.stride
        size = np.minimum(self.room, lengths[document] - begin)
        if self.drop_tail:
            kept = (size == self.room) | (windows[document] == 1)
            document, begin, size = document[kept], begin[kept], size[kept]
        if len(size) == 0:
            return None
        index, offsets = spans(documents.offsets[document] + begin, size)
        ids = documents.ids[index]
        labels = (ids if documents.labels is None else documents.labels[index]) if self.labels else None
        if len(self.prefix):
            assert labels is not None
            labels = labels.copy()
            labels[offsets[:-1]] = IGNORE_INDEX
            untrained = np.full(len(self.prefix), IGNORE_INDEX, dtype=np.int32)
            labels, _ = with_affixes(labels, offsets, untrained, self.prefix[:0])
            ids, offsets = with_affixes(ids, offsets, self.prefix, self.prefix[:0])
        columns = [to_list_array(ids, offsets)] + ([] if labels is None else [to_list_array(labels, offsets)])
        return pa.RecordBatch.from_arrays(columns, schema=schema(self.columns))


def with_affixes(values: Int32, offsets: Int64, prefix: Int32, suffix: Int32) -> tuple[Int32, Int64]:
    """Each span `values[offsets[i]:offsets[i+1]]` with `prefix` before and `suffix` behind it."""
    extra = len(prefix) + len(suffix)
    if extra == 0:
        return values, offsets
    count = len(offsets) - 1
    moved = offsets + extra * np.arange(count + 1)
    result = np.empty(moved[-1], dtype=np.int32)
    own = np.ones(moved[-1], dtype=bool)
    for position, item in enumerate(prefix):
        result[moved[:-1] + position] = item
        own[moved[:-1] + position] = False
    for position, item in enumerate(suffix):
        result[moved[1:] - len(suffix) + position] = item
        own[moved[1:] - len(suffix) + position] = False
    result[own] = values
    return result, moved
