"""Stretches of encoded tokens that rows are made of, and plans: which pieces become which rows.

Encoded documents lie in blocks on disk. Rows depend on little of them: how long documents are, and where conversations
are cut. That is what `Pieces` say, a few bytes for each document. From them one process decides which rows there are
(`planners.py`), and any other makes them: `Plan.documents` reads the tokens of a plan, and the packer that gave the
pieces lays them out as rows.

Cost: a plan takes 16 bytes for each piece; reading it, the speed of memory.
"""

import dataclasses
import os
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from jllm.data.dataset.columns import IGNORE_INDEX, Int32, Int64
from jllm.data.packing.documents import Documents, spans


class Block(NamedTuple):
    """Where the tokens of encoded documents lie.

    Attributes:
        path: of the file.
        ids: byte at which the ids begin, each of `width` bytes.
        labels: byte at which bits begin that say which tokens are trained on; None where all are.
    """

    path: str
    ids: int
    width: int
    labels: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pieces:
    """What rows may be made of, in order.

    Attributes:
        starts, sizes: [P] the first token of each piece in its block, and how many it has.
        counts: [D] how many pieces each document has; None where each has one.
        masked: [P] how many tokens at a piece's beginning are not trained on here, because they are in another piece;
            None where that is so for no piece.
        classes: [P] the control class of each; None where nobody asked for them.
        cuts: [P] where in each piece, a preference pair, the rejected conversation begins; None where they are none.
    """

    starts: Int64
    sizes: Int64
    counts: Int64 | None = None
    masked: Int64 | None = None
    classes: NDArray[np.int8] | None = None
    cuts: Int64 | None = None

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def documents(self) -> int:
        return len(self.sizes if self.counts is None else self.counts)

    def of_documents(self, start: int, end: int) -> "Pieces":
        """The pieces of documents `start` to `end`."""
        if start == 0 and end == self.documents:
            return self
        counts, low, high = None, start, end
        if self.counts is not None:
            counts = self.counts[start:end]
            low = int(self.counts[:start].sum())
            high = low + int(counts.sum())
        return dataclasses.replace(self._at(slice(low, high)), counts=counts)

    def take(self, chosen: NDArray[np.bool_]) -> "Pieces":
        """The pieces of the documents that are chosen."""
        if self.counts is None:
            return self._at(chosen)
        return dataclasses.replace(self._at(np.repeat(chosen, self.counts)), counts=self.counts[chosen])

    def _at(self, index: "slice | NDArray[np.bool_]") -> "Pieces":
        return Pieces(
            starts=self.starts[index],
            sizes=self.sizes[index],
            masked=None if self.masked is None else self.masked[index],
            classes=None if self.classes is None else self.classes[index],
            cuts=None if self.cuts is None else self.cuts[index],
        )


def whole(documents: Documents) -> Pieces:
    """Each document as one piece."""
    return Pieces(starts=documents.offsets[:-1], sizes=documents.lengths, classes=documents.classes)


def windows(documents: Documents, room: int, stride: int) -> Pieces:
    """Each document in windows of at most `room` tokens that start `stride` tokens apart; one where it fits."""
    lengths = documents.lengths
    assert documents.cuts is None or lengths.max(initial=0) <= room, "a pair is never split"
    counts = 1 + np.maximum(0, -(-(lengths - room) // stride))
    document = np.repeat(np.arange(len(lengths)), counts)
    first = np.cumsum(counts) - counts
    begin = (np.arange(len(document)) - first[document]) * stride
    return Pieces(
        starts=documents.offsets[document] + begin,
        sizes=np.minimum(room, lengths[document] - begin),
        counts=counts,
        classes=None if documents.classes is None else documents.classes[document],
        cuts=documents.cuts,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Rows that can be made.

    Attributes:
        blocks: where their pieces lie.
        of_block: [P] the block of each piece, by its number in `blocks`.
        pieces: in the order in which they stand in the rows.
        counts: [R] how many pieces each row has; None where each has one, or the rows are those of a stream.
        step: of a stream, how many tokens after each other its rows begin; 0 where it is none.
        ends: it is a stream that ends with these rows, of which the last may be shorter.
        lengths: [R] the length of each row as it is written.
    """

    blocks: tuple[Block, ...]
    of_block: Int64
    pieces: Pieces
    lengths: Int64
    counts: Int64 | None = None
    step: int = 0
    ends: bool = False

    def __len__(self) -> int:
        return len(self.lengths)

    def slice(self, start: int, end: int) -> "Plan":
        """Rows `start` to `end`."""
        if start == 0 and end == len(self):
            return self
        lengths = self.lengths[start:end]
        if self.step:
            ends = self.ends and end == len(self)
            stream = stretch(self, start * self.step, None if ends else end * self.step + 1)
            return dataclasses.replace(stream, lengths=lengths, ends=ends)
        low, high, counts = start, end, None
        if self.counts is not None:
            counts = self.counts[start:end]
            low = int(self.counts[:start].sum())
            high = low + int(counts.sum())
        pieces = dataclasses.replace(self.pieces, counts=None).of_documents(low, high)
        return dataclasses.replace(
            self, of_block=self.of_block[low:high], pieces=pieces, lengths=lengths, counts=counts
        )

    def documents(self) -> Documents:
        """The pieces, read: each a document."""
        pieces = self.pieces
        offsets = np.zeros(len(pieces) + 1, dtype=np.int64)
        np.cumsum(pieces.sizes, out=offsets[1:])
        ids = np.empty(offsets[-1], dtype=np.int32)
        has_labels = any(block.labels is not None for block in self.blocks)
        labels = np.empty(offsets[-1], dtype=np.int32) if has_labels else None
        for number, block in enumerate(self.blocks):
            chosen = np.flatnonzero(self.of_block == number)
            if len(chosen):
                _read(block, pieces.starts[chosen], pieces.sizes[chosen], offsets[chosen], ids, labels)
        if pieces.masked is not None and labels is not None:
            for piece in np.flatnonzero(pieces.masked).tolist():
                labels[offsets[piece] : offsets[piece] + pieces.masked[piece]] = IGNORE_INDEX
        return Documents(ids=ids, offsets=offsets, labels=labels, classes=pieces.classes, cuts=pieces.cuts)


def planned(block: Block, pieces: Pieces, lengths: Int64) -> Plan:
    """A row of each piece of a block."""
    of_block = np.zeros(len(pieces), dtype=np.int64)
    return Plan(blocks=(block,), of_block=of_block, pieces=dataclasses.replace(pieces, counts=None), lengths=lengths)


def joined(plans: "list[Plan]") -> Plan:
    """The pieces of several plans one behind the other; their rows are not known."""
    first, *others = plans
    if not others:
        return first
    blocks: list[Block] = []
    of_block = []
    for plan in plans:
        same = bool(blocks) and blocks[-1] == plan.blocks[0]
        of_block.append(plan.of_block + len(blocks) - same)
        blocks += plan.blocks[same:]
    parts = [plan.pieces for plan in plans]
    classes = [part.classes for part in parts if part.classes is not None]
    assert all(part.masked is None and part.counts is None for part in parts)
    pieces = Pieces(
        starts=np.concatenate([part.starts for part in parts]),
        sizes=np.concatenate([part.sizes for part in parts]),
        classes=np.concatenate(classes) if classes else None,
    )
    return dataclasses.replace(first, blocks=tuple(blocks), of_block=np.concatenate(of_block), pieces=pieces)


def stretch(plan: Plan, low: int, high: int | None) -> Plan:
    """The tokens `low` to `high` of a plan's pieces; None: to the end, with what is empty there."""
    pieces = plan.pieces
    ends = np.cumsum(pieces.sizes)
    begins = ends - pieces.sizes
    first = int(np.searchsorted(ends, low, side="right"))
    last = len(ends) if high is None else int(np.searchsorted(begins, high, side="left"))
    starts, sizes = pieces.starts[first:last].copy(), pieces.sizes[first:last].copy()
    if len(sizes):
        over = 0 if high is None else max(0, int(ends[last - 1]) - high)
        sizes[-1] -= over
        before = max(0, low - int(begins[first]))
        starts[0] += before
        sizes[0] -= before
    of_block = plan.of_block[first:last]
    low_block = int(of_block.min(initial=len(plan.blocks)))
    high_block = int(of_block.max(initial=-1))
    return dataclasses.replace(
        plan,
        blocks=plan.blocks[low_block : high_block + 1],
        of_block=of_block - low_block,
        pieces=Pieces(
            starts=starts, sizes=sizes, classes=None if pieces.classes is None else pieces.classes[first:last]
        ),
    )


def _read(block: Block, starts: Int64, sizes: Int64, offsets: Int64, ids: Int32, labels: Int32 | None) -> None:
    """Read the pieces of a block to where they belong in `ids` and `labels`: in one stretch where that is not much
    more, else one by one."""
    descriptor = os.open(block.path, os.O_RDONLY)
    try:
        low, high, total = int(starts.min()), int((starts + sizes).max()), int(sizes.sum())
        if high - low <= 2 * total:
            found, marked = _tokens(descriptor, block, low, high - low, labels is not None)
            together = bool((np.diff(starts) == sizes[:-1]).all() and (np.diff(offsets) == sizes[:-1]).all())
            if together:
                at = slice(int(offsets[0]), int(offsets[0]) + total)
                ids[at] = found
                if labels is not None:
                    labels[at] = marked
                return
            source, target = spans(starts - low, sizes)[0], spans(offsets, sizes)[0]
            ids[target] = found[source]
            if labels is not None:
                labels[target] = marked[source]
            return
        for start, size, at in zip(starts.tolist(), sizes.tolist(), offsets.tolist(), strict=True):
            found, marked = _tokens(descriptor, block, start, size, labels is not None)
            ids[at : at + size] = found
            if labels is not None:
                labels[at : at + size] = marked
    finally:
        os.close(descriptor)


def _tokens(descriptor: int, block: Block, start: int, count: int, labels: bool) -> tuple[Int32, Int32]:
    """Ids and labels of `count` tokens from `start` on; the ids twice where labels are not wanted."""
    kind = np.dtype(np.uint16 if block.width == 2 else np.int32)
    ids = np.frombuffer(_bytes(descriptor, count * block.width, block.ids + start * block.width), dtype=kind)
    ids = ids.astype(np.int32, copy=False)
    if not labels or block.labels is None:
        return ids, ids
    first, end = start // 8, -(-(start + count) // 8)
    bits = np.frombuffer(_bytes(descriptor, end - first, block.labels + first), dtype=np.uint8)
    trained = np.unpackbits(bits)[start - 8 * first :][:count].view(np.bool_)
    return ids, np.where(trained, ids, np.int32(IGNORE_INDEX))


def _bytes(descriptor: int, size: int, at: int) -> bytes:
    """Raises:
    EOFError: there are fewer.
    """
    found = os.pread(descriptor, size, at)
    while len(found) < size:
        more = os.pread(descriptor, size - len(found), at + len(found))
        if not more:
            raise EOFError("a block of encoded documents is shorter than it was")
        found += more
    return found
