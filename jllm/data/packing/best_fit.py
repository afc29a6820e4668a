"""Best-fit packing: documents whole, in as few rows as can be had cheaply.

Best-fit decreasing over all documents of a split, as in "Fewer Truncations" (arXiv 2404.10830): the longest first, each
into the row with the smallest room that holds it. A document longer than a row is cut into windows that overlap by
one token, so that every token but its first is still predicted once; no other document is cut.

Guarantees: the bins are those of the textbook algorithm, rows with equal room being filled oldest first.
Cost: a few operations and 12 bytes of memory for each document (plus a short list for each row); the tokens stay on
disk. The rooms are the bits of one integer, so that finding the smallest that fits is a shift and a lowest bit: L / 64
machine words, which for rows of any usual length is faster than a segment tree in Python.
"""

import collections
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from jllm.data.dataset.columns import Column
from jllm.data.dataset.shards import CU_SEQLENS, INPUT_IDS, LABELS, Int32, Int64, schema, to_list_array
from jllm.data.packing.conversations import padded_rows
from jllm.data.packing.packers import Documents

BATCH_TOKENS = 1 << 19


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
        prepare: applied to documents before they are packed; it may cut them.
        pad_to: pad every row to a multiple of this with `pad_id`; None leaves rows as long as they are.
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
        prepare: Callable[[Documents], Documents] | None = None,
        pairs: bool = False,
    ) -> None:
        self.length = length
        self.prepare = prepare
        self.pairs = pairs
        self.pad_to = pad_to
        self.pad_id = pad_id
        self.labels = labels or pad_to is not None
        self.columns: tuple[str, ...] = (INPUT_IDS, LABELS, CU_SEQLENS) if self.labels else (INPUT_IDS, CU_SEQLENS)
        self._chunks: list[Documents] = []

    def feed(self, documents: Documents) -> pa.RecordBatch | None:
        if self.prepare is not None:
            documents = self.prepare(documents)
        if documents.stored is not None:  # keep the offsets; the ids are read again when the rows are known
            empty = np.empty(0, dtype=np.int32)
            documents = dataclasses.replace(documents, ids=empty, labels=empty)
        self._chunks.append(documents)
        return None

    def finish(self) -> Iterator[pa.RecordBatch]:
        chunk, start, size = self._windows()
        row_documents = best_fit(size, self.length)
        at = 0
        while at < len(row_documents):
            end, tokens = at, 0
            while end < len(row_documents) and tokens < BATCH_TOKENS:
                tokens += self.length
                end += 1
            yield self._rows(row_documents[at:end], chunk, start, size)
            at = end
        self._chunks = []

    def _windows(self) -> tuple[Int64, Int64, Int64]:
        """The windows of all documents, one for a document that fits: number of the chunk, first token where it lies,
        length."""
        chunks, starts, sizes = [np.empty(0, np.int64)], [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        step = self.length - 1
        for number, documents in enumerate(self._chunks):
            lengths = documents.lengths
            count = 1 + np.maximum(0, -(-(lengths - self.length) // step))
            owner = np.repeat(np.arange(len(lengths)), count)
            begin = (np.arange(len(owner)) - (np.cumsum(count) - count)[owner]) * step
            chunks.append(np.full(len(owner), number))
            first = documents.offsets if documents.stored is None else documents.stored.starts
            starts.append(first[owner] + begin)
            sizes.append(np.minimum(self.length, lengths[owner] - begin))
        return np.concatenate(chunks), np.concatenate(starts), np.concatenate(sizes)

    def _rows(self, rows: list[list[int]], chunk: Int64, start: Int64, size: Int64) -> pa.RecordBatch:
        windows = np.array([number for row in rows for number in row], dtype=np.int64)
        counts = np.array([len(row) for row in rows], dtype=np.int64)
        offsets = np.zeros(len(windows) + 1, dtype=np.int64)
        np.cumsum(size[windows], out=offsets[1:])
        ids = np.empty(offsets[-1], dtype=np.int32)
        labels = np.empty(offsets[-1] if self.labels else 0, dtype=np.int32)
        for k in np.lexsort((start[windows], chunk[windows])).tolist():
            window = windows[k]
            low, high = int(offsets[k]), int(offsets[k + 1])
            self._read(self._chunks[int(chunk[window])], int(start[window]), ids[low:high], labels[low:high])
        ends = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum(counts, out=ends[1:])
        row_offsets = offsets[ends]
        document_ends, ends = self._document_ends(windows, offsets), ends * (2 if self.pairs else 1)
        boundary_offsets = ends + np.arange(len(rows) + 1)
        boundaries = np.zeros(boundary_offsets[-1], dtype=np.int64)
        row_of = np.repeat(np.arange(len(rows)), np.diff(ends))
        boundaries[np.arange(len(document_ends)) + row_of + 1] = document_ends - row_offsets[row_of]
        packed = Documents(ids=ids, offsets=row_offsets, labels=labels if self.labels else None)
        if self.pad_to is not None:
            return padded_rows(packed, boundaries, boundary_offsets, self.pad_to, self.pad_id)
        columns = [to_list_array(ids, row_offsets)]
        if self.labels:
            columns.append(to_list_array(labels, row_offsets))
        columns.append(to_list_array(boundaries.astype(np.int32), boundary_offsets))
        return pa.RecordBatch.from_arrays(columns, schema=schema(self.columns))

    def _document_ends(self, windows: Int64, offsets: Int64) -> Int64:
        """Where the documents of rows end, in these windows one behind the other."""
        if not self.pairs:
            return offsets[1:]
        cuts = np.concatenate([each.cuts for each in self._chunks if each.cuts is not None])
        assert len(cuts) == sum(map(len, self._chunks)), "a pair is never split"
        found: Int64 = np.stack([offsets[:-1] + cuts[windows], offsets[1:]], axis=1).ravel()
        return found

    def _read(self, documents: Documents, start: int, ids: Int32, labels: Int32) -> None:
        """Fill `ids` and `labels` with the tokens of a chunk from `start` on, counted where the chunk lies."""
        if documents.stored is None:
            ids[:] = documents.ids[start : start + len(ids)]
            if self.labels:
                given = documents.ids if documents.labels is None else documents.labels
                labels[:] = given[start : start + len(ids)]
            return
        stored = documents.stored
        descriptor = os.open(stored.path, os.O_RDONLY)
        try:
            os.preadv(descriptor, [ids.data.cast("B")], stored.ids + 4 * start)
            if self.labels:
                at = stored.ids if stored.labels is None else stored.labels
                os.preadv(descriptor, [labels.data.cast("B")], at + 4 * start)
        finally:
            os.close(descriptor)

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        pass
