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

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from jllm.data.dataset.columns import Column
from jllm.data.dataset.shards import CU_SEQLENS, IGNORE_INDEX, INPUT_IDS, LABELS, Int32, schema, to_list_array
from jllm.data.packing.documents import Documents, spans, with_affixes
from jllm.data.packing.pieces import Pieces, Plan, whole, windows
from jllm.data.packing.planners import PiecePlanner, Planner, StreamPlanner


class Packer(Protocol):
    """Turns documents into rows; one packer for each split.

    `columns` are those of the contract that its rows have, `further` the others. `whole` packers give no row before
    `finish`, and need all documents of the split for it.

    Rows are made in one go by `feed` and `finish`, or in three steps that may be those of three processes: `pieces` of
    documents, a plan of the `planner`, its rows. Both ways give the same rows.
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

    def pieces(self, documents: Documents) -> Pieces:
        """What rows are made of, of documents that lie in a block as they are given here."""
        ...

    def planner(self) -> Planner:
        """What decides for a split which rows there are."""
        ...

    def rows(self, plan: Plan, documents: Documents) -> pa.RecordBatch:
        """The rows of a plan, of which `documents` are the pieces."""
        ...


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

    def pieces(self, documents: Documents) -> Pieces:
        return whole(documents)

    def planner(self) -> Planner:
        return StreamPlanner(self.step, extra=len(self.prefix), drop_tail=self.drop_tail)

    def rows(self, plan: Plan, documents: Documents) -> pa.RecordBatch:
        fresh = StackPacker(self.length, labels=self.labels, prefix=tuple(self.prefix.tolist()))
        made = [fresh.feed(documents), *(fresh.finish() if plan.ends else ())]
        return pa.Table.from_batches([each for each in made if each is not None]).combine_chunks().to_batches()[0]

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
        pieces = self.pieces(documents)
        if len(pieces) == 0:
            return None
        index, offsets = spans(pieces.starts, pieces.sizes)
        ids = documents.ids[index]
        labels = None if documents.labels is None else documents.labels[index]
        return self._rows(Documents(ids=ids, offsets=offsets, labels=labels))

    def pieces(self, documents: Documents) -> Pieces:
        pieces = windows(documents, self.room, self.stride)
        if not self.drop_tail:
            return pieces
        assert pieces.counts is not None
        document = np.repeat(np.arange(len(documents)), pieces.counts)
        kept = (pieces.sizes == self.room) | (pieces.counts[document] == 1)
        return Pieces(
            starts=pieces.starts[kept],
            sizes=pieces.sizes[kept],
            counts=np.bincount(document[kept], minlength=len(documents)),
            classes=None if pieces.classes is None else pieces.classes[kept],
        )

    def planner(self) -> Planner:
        return PiecePlanner(lambda sizes: sizes + len(self.prefix))

    def rows(self, plan: Plan, documents: Documents) -> pa.RecordBatch:
        return self._rows(documents)

    def _rows(self, pieces: Documents) -> pa.RecordBatch:
        """A row of each."""
        ids, offsets = pieces.ids, pieces.offsets
        labels = (ids if pieces.labels is None else pieces.labels) if self.labels else None
        if len(self.prefix):
            assert labels is not None
            labels = labels.copy()
            labels[offsets[:-1][np.diff(offsets) > 0]] = IGNORE_INDEX
            untrained = np.full(len(self.prefix), IGNORE_INDEX, dtype=np.int32)
            labels, _ = with_affixes(labels, offsets, untrained, self.prefix[:0])
            ids, offsets = with_affixes(ids, offsets, self.prefix, self.prefix[:0])
        columns = [to_list_array(ids, offsets)] + ([] if labels is None else [to_list_array(labels, offsets)])
        return pa.RecordBatch.from_arrays(columns, schema=schema(self.columns))
