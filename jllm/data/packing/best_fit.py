"""Best-fit packing: documents whole, in as few rows as can be had cheaply.

Best-fit decreasing over all documents of a split, as in "Fewer Truncations" (arXiv 2404.10830): the longest first, each
into the row with the smallest room that holds it. A document longer than a row is cut into windows that overlap by
one token, so that every token but its first is still predicted once; no other document is cut.

Guarantees: the bins are those of the textbook algorithm, rows with equal room being filled oldest first.
Cost: a few operations and some 20 bytes of memory for each document (plus a short list for each row) where rows are
planned, and the tokens stay on disk; `feed` holds them. The rooms are the bits of one integer, so that finding the
smallest that fits is a shift and a lowest bit: L / 64 machine words, which for rows of any usual length is faster than
a segment tree in Python.
"""

import collections
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from jllm.data.dataset.columns import Column
from jllm.data.dataset.shards import CU_SEQLENS, INPUT_IDS, LABELS, Int64, schema, to_list_array
from jllm.data.packing.conversations import padded, padded_rows, pieces_of, split_long
from jllm.data.packing.documents import Documents, concatenated, spans
from jllm.data.packing.pieces import Pieces, Plan, windows
from jllm.data.packing.planners import BATCH_TOKENS, BestFitPlanner, Planner


def best_fit(lengths: Sequence[int] | Int64, room: int) -> list[list[int]]:
    """Rows of at most `room` tokens: for each the numbers of its documents, in the order in which they were put there.

    Args:
        lengths: of the documents; none is longer than `room`.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist()
    sizes = np.asarray(lengths, dtype=np.int64).tolist()
    rows: list[list[int]] = []
    rows_with: list[collections.deque[int] | None] = [None] * (room + 1)
    rooms = 0  # bit r is set where some row has room for r more tokens
    for number in order:
        size = sizes[number]
        larger = rooms >> size
        if larger and size:
            left = size + (larger & -larger).bit_length() - 1
            waiting = rows_with[left]
            assert waiting is not None
            row = waiting.popleft()
            if not waiting:
                rooms ^= 1 << left
            rows[row].append(number)
            left -= size
        else:
            row, left = len(rows), room - size
            rows.append([number])
        if left:
            queue = rows_with[left]
            if queue is None:
                queue = rows_with[left] = collections.deque()
            if not queue:
                rooms |= 1 << left
            queue.append(row)
    return rows


class BestFitPacker:
    """Packs the documents of a whole split; see the module.

    Args:
        length: tokens in a row.
        labels: the documents have labels.
        pad_to: pad every row to a multiple of this with `pad_id`; None leaves rows as long as they are.
        conversations: documents longer than a row are continued as `ConversationPacker` does it.
        pairs: the documents are preference pairs (`Documents.cuts`), and none is longer than a row: each becomes two
            documents of one row.
    """

    whole = True
    further: tuple[Column, ...] = ()

    def __init__(
        self,
        length: int,
        *,
        labels: bool,
        pad_to: int | None = None,
        pad_id: int = 0,
        conversations: bool = False,
        pairs: bool = False,
    ) -> None:
        self.length = length
        self.conversations = conversations
        self.pairs = pairs
        self.pad_to = pad_to
        self.pad_id = pad_id
        self.labels = labels or pad_to is not None
        self.columns: tuple[str, ...] = (INPUT_IDS, LABELS, CU_SEQLENS) if self.labels else (INPUT_IDS, CU_SEQLENS)
        self._held: list[Documents] = []

    def feed(self, documents: Documents) -> pa.RecordBatch | None:
        self._held.append(split_long(documents, self.length) if self.conversations else documents)
        return None

    def finish(self) -> Iterator[pa.RecordBatch]:
        documents = _joined(self._held)
        self._held = []
        pieces = windows(documents, self.length, self.length - 1)
        rows = best_fit(pieces.sizes, self.length)
        at_once = max(1, -(-BATCH_TOKENS // self.length))
        for at in range(0, len(rows), at_once):
            some = rows[at : at + at_once]
            chosen = np.array([number for row in some for number in row], dtype=np.int64)
            index, offsets = spans(pieces.starts[chosen], pieces.sizes[chosen])
            labels = None if documents.labels is None else documents.labels[index]
            cuts = None if pieces.cuts is None else pieces.cuts[chosen]
            counts = np.array([len(row) for row in some], dtype=np.int64)
            yield self._rows(Documents(ids=documents.ids[index], offsets=offsets, labels=labels, cuts=cuts), counts)

    def pieces(self, documents: Documents) -> Pieces:
        if self.conversations:
            return pieces_of(documents, self.length)
        return windows(documents, self.length, self.length - 1)

    def planner(self) -> Planner:
        return BestFitPlanner(self.length, lambda sizes: padded(sizes, self.pad_to), best_fit)

    def rows(self, plan: Plan, documents: Documents) -> pa.RecordBatch:
        assert plan.counts is not None
        return self._rows(documents, plan.counts)

    def _rows(self, pieces: Documents, counts: Int64) -> pa.RecordBatch:
        """Rows of so many pieces each."""
        labels = (pieces.ids if pieces.labels is None else pieces.labels) if self.labels else None
        ends = np.zeros(len(counts) + 1, dtype=np.int64)
        np.cumsum(counts, out=ends[1:])
        row_offsets = pieces.offsets[ends]
        document_ends, ends = self._document_ends(pieces), ends * (2 if self.pairs else 1)
        boundary_offsets = ends + np.arange(len(counts) + 1)
        boundaries = np.zeros(boundary_offsets[-1], dtype=np.int64)
        row_of = np.repeat(np.arange(len(counts)), np.diff(ends))
        boundaries[np.arange(len(document_ends)) + row_of + 1] = document_ends - row_offsets[row_of]
        if self.pad_to is not None:
            packed = Documents(ids=pieces.ids, offsets=row_offsets, labels=labels)
            return padded_rows(packed, boundaries, boundary_offsets, self.pad_to, self.pad_id)
        columns = [to_list_array(pieces.ids, row_offsets)]
        if labels is not None:
            columns.append(to_list_array(labels, row_offsets))
        columns.append(to_list_array(boundaries.astype(np.int32), boundary_offsets))
        return pa.RecordBatch.from_arrays(columns, schema=schema(self.columns))

    def _document_ends(self, pieces: Documents) -> Int64:
        """Where the documents of rows end, in these pieces one behind the other."""
        if not self.pairs:
            return pieces.offsets[1:]
        assert pieces.cuts is not None
        found: Int64 = np.stack([pieces.offsets[:-1] + pieces.cuts, pieces.offsets[1:]], axis=1).ravel()
        return found

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        pass


def _joined(parts: Sequence[Documents]) -> Documents:
    """Documents one behind the other."""
    ids = [part.ids for part in parts]
    labels = [part.ids if part.labels is None else part.labels for part in parts]
    has_labels = any(part.labels is not None for part in parts)
    offsets = np.zeros(sum(map(len, parts)) + 1, dtype=np.int64)
    np.cumsum(np.concatenate([np.empty(0, np.int64), *(part.lengths for part in parts)]), out=offsets[1:])
    empty = np.empty(0, dtype=np.int32)
    return Documents(
        ids=np.concatenate([empty, *ids]),
        offsets=offsets,
        labels=np.concatenate([empty, *labels]) if has_labels else None,
        cuts=concatenated([part.cuts for part in parts]),
    )
