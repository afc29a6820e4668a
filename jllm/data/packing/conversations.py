"""Conversations to rows.

A conversation that fits is one row. A longer one becomes several: the first row starts at its beginning; each further
row starts `length // 2` tokens (all there are, where there are fewer) before the first answer token that no row has
trained yet, and what it repeats is masked. So each answer token is trained exactly once, and no row is longer than
`length`.

Cost: numpy over whole chunks for conversations that fit; a Python loop over rows for longer ones.
"""

import numpy as np
import pyarrow as pa

from jllm.data.dataset.shards import CU_SEQLENS, IGNORE_INDEX, INPUT_IDS, LABELS, Int32, Int64, schema, to_list_array
from jllm.data.packing.documents import Documents
from jllm.data.packing.packers import WithoutRest
from jllm.data.packing.pieces import Pieces, Plan, whole
from jllm.data.packing.planners import PiecePlanner, Planner


def continued_rows(labels: Int32, length: int) -> list[tuple[int, int, int]]:
    """The rows of one conversation longer than `length`: first token, end, and the first token that may be trained."""
    answers = np.flatnonzero(labels != IGNORE_INDEX)
    rows = [(0, length, 0)]
    done = length
    while True:
        following = int(np.searchsorted(answers, done))
        if following == len(answers):
            return rows
        first = int(answers[following])
        begin = max(0, first - max(1, length // 2))
        end = min(len(labels), begin + length)
        rows.append((begin, end, done))
        done = end


def split_long(documents: Documents, length: int) -> Documents:
    """Conversations with the longer ones cut into rows of at most `length` tokens."""
    lengths = documents.lengths
    if len(lengths) == 0 or int(lengths.max()) <= length:
        return documents
    assert documents.labels is not None
    ids: list[Int32] = []
    labels: list[Int32] = []
    begun = 0
    for number in np.flatnonzero(lengths > length).tolist():
        low, high = int(documents.offsets[number]), int(documents.offsets[number + 1])
        for i in range(begun, number):
            ids.append(documents.ids[documents.offsets[i] : documents.offsets[i + 1]])
            labels.append(documents.labels[documents.offsets[i] : documents.offsets[i + 1]])
        for start, end, trainable in continued_rows(documents.labels[low:high], length):
            row = documents.labels[low + start : low + end].copy()
            row[: max(0, trainable - start)] = IGNORE_INDEX
            if np.all(row == IGNORE_INDEX):
                continue
            ids.append(documents.ids[low + start : low + end])
            labels.append(row)
        begun = number + 1
    for i in range(begun, len(documents)):
        ids.append(documents.ids[documents.offsets[i] : documents.offsets[i + 1]])
        labels.append(documents.labels[documents.offsets[i] : documents.offsets[i + 1]])
    return joined(ids, labels)


def pieces_of(documents: Documents, length: int) -> Pieces:
    """What `split_long` gives, as pieces of the documents."""
    lengths = documents.lengths
    if len(lengths) == 0 or int(lengths.max()) <= length:
        return whole(documents)
    assert documents.labels is not None
    parts: list[tuple[int, int, int]] = []
    counts = np.ones(len(lengths), dtype=np.int64)
    for number, (low, size) in enumerate(zip(documents.offsets.tolist(), lengths.tolist(), strict=False)):
        if size <= length:
            parts.append((low, size, 0))
            continue
        labels = documents.labels[low : low + size]
        rows = [
            (low + start, end - start, max(0, trainable - start))
            for start, end, trainable in continued_rows(labels, length)
            if np.any(labels[max(start, trainable) : end] != IGNORE_INDEX)
        ]
        counts[number] = len(rows)
        parts += rows
    starts, sizes, masked = np.array(parts, dtype=np.int64).reshape(-1, 3).T
    classes = None if documents.classes is None else np.repeat(documents.classes, counts)
    return Pieces(starts=starts, sizes=sizes, counts=counts, masked=masked, classes=classes)


def trained_per_piece(documents: Documents, pieces: Pieces) -> Int64:
    """Trained tokens of each piece, its first token not counted: nothing predicts it."""
    assert documents.labels is not None
    sums = np.zeros(len(documents.labels) + 1, dtype=np.int64)
    np.cumsum(documents.labels != IGNORE_INDEX, out=sums[1:])
    untrained = np.minimum(pieces.sizes, 1 if pieces.masked is None else np.maximum(pieces.masked, 1))
    found: Int64 = sums[pieces.starts + pieces.sizes] - sums[pieces.starts + untrained]
    return found


def joined(ids: list[Int32], labels: list[Int32]) -> Documents:
    """Rows as documents."""
    offsets = np.zeros(len(ids) + 1, dtype=np.int64)
    np.cumsum([len(row) for row in ids], out=offsets[1:])
    empty = np.empty(0, dtype=np.int32)
    return Documents(ids=np.concatenate([empty, *ids]), offsets=offsets, labels=np.concatenate([empty, *labels]))


def trained_per_document(documents: Documents) -> Int64:
    """Trained tokens of each document, its first token not counted: nothing predicts it."""
    assert documents.labels is not None
    trained = documents.labels != IGNORE_INDEX
    trained[documents.offsets[:-1][documents.lengths > 0]] = False
    sums = np.zeros(len(trained) + 1, dtype=np.int64)
    np.cumsum(trained, out=sums[1:])
    return sums[documents.offsets[1:]] - sums[documents.offsets[:-1]]


class ConversationPacker(WithoutRest):
    """One conversation a row.

    Args:
        length: tokens in a row; longer conversations become several.
        pad_to: pad every row with `pad_id` to a multiple of this; the real length is in `cu_seqlens`.
        filter_rows: drop rows with at most one trained token.
    """

    def __init__(self, length: int, *, pad_to: int | None = None, pad_id: int = 0, filter_rows: bool = False) -> None:
        self.length = length
        self.pad_to = pad_to
        self.pad_id = pad_id
        self.filter_rows = filter_rows
        self.columns: tuple[str, ...] = (INPUT_IDS, LABELS, CU_SEQLENS) if pad_to else (INPUT_IDS, LABELS)

    def feed(self, documents: Documents) -> pa.RecordBatch | None:
        documents = split_long(documents, self.length)
        if self.filter_rows:
            documents = documents.take(np.flatnonzero(trained_per_document(documents) > 1))
        return self._rows(documents) if len(documents) else None

    def pieces(self, documents: Documents) -> Pieces:
        pieces = pieces_of(documents, self.length)
        if not self.filter_rows:
            return pieces
        kept = trained_per_piece(documents, pieces) > 1
        counts = np.ones(len(documents), dtype=np.int64) if pieces.counts is None else pieces.counts
        of_piece = np.repeat(np.arange(len(documents)), counts)
        return Pieces(
            starts=pieces.starts[kept],
            sizes=pieces.sizes[kept],
            counts=np.bincount(of_piece[kept], minlength=len(documents)),
            masked=None if pieces.masked is None else pieces.masked[kept],
            classes=None if pieces.classes is None else pieces.classes[kept],
        )

    def planner(self) -> Planner:
        return PiecePlanner(lambda sizes: padded(sizes, self.pad_to))

    def rows(self, plan: Plan, documents: Documents) -> pa.RecordBatch:
        return self._rows(documents)

    def _rows(self, documents: Documents) -> pa.RecordBatch:
        """A row of each."""
        assert documents.labels is not None
        if self.pad_to is None:
            columns = [to_list_array(values, documents.offsets) for values in (documents.ids, documents.labels)]
            return pa.RecordBatch.from_arrays(columns, schema=schema(self.columns))
        boundaries = np.stack([np.zeros_like(documents.lengths), documents.lengths], axis=1).reshape(-1)
        return padded_rows(documents, boundaries, np.arange(len(documents) + 1) * 2, self.pad_to, self.pad_id)


def padded(sizes: Int64, pad_to: int | None) -> Int64:
    """The lengths of rows that are padded to a multiple of `pad_to`."""
    return sizes if pad_to is None else -(-sizes // pad_to) * pad_to


def padded_rows(
    rows: Documents, boundaries: Int64, boundary_offsets: Int64, pad_to: int, pad_id: int
) -> pa.RecordBatch:
    """Rows padded to a multiple of `pad_to`, with their boundaries, which end before the padding."""
    assert rows.labels is not None
    lengths = rows.lengths
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(padded(lengths, pad_to), out=offsets[1:])
    target = np.arange(len(rows.ids)) + np.repeat(offsets[:-1] - rows.offsets[:-1], lengths)
    ids = np.full(offsets[-1], pad_id, dtype=np.int32)
    labels = np.full(offsets[-1], IGNORE_INDEX, dtype=np.int32)
    ids[target], labels[target] = rows.ids, rows.labels
    columns = [
        to_list_array(ids, offsets),
        to_list_array(labels, offsets),
        to_list_array(boundaries.astype(np.int32), boundary_offsets),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema((INPUT_IDS, LABELS, CU_SEQLENS)))
