"""Rows of a shard → micro-batches: inputs, shifted targets, position ids.

The label shift happens here and nowhere else: a row of n tokens becomes n - 1 inputs and n - 1 targets. The first
token of a document is never a target, nor is padding.

Cost: numpy's calls are paid once for all micro-batches of one shape.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from jllm.data.dataset.shards import IGNORE_INDEX, Int64
from jllm.models.pipeline.bundle import CONTROL_CLASS, DOCUMENTS, LABELS, POSITION_IDS, READ, Bundle, Planes
from jllm.train.data.rows import Row


@dataclasses.dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What enters the pipeline at once.

    Attributes:
        input_ids: [B, S] int64.
        planes: each [B, S] int64: labels (shifted, `IGNORE_INDEX` where not trained on), position ids, and what else
            was asked for: control classes (shifted as labels are, 0 where not trained on), and the documents of pairs
            (`jllm.train.objectives.preference`).
        documents: of the rows, one after the other: how many each has; only with the plane of documents.
    """

    input_ids: Tensor
    planes: Planes
    documents: tuple[int, ...] = ()

    @property
    def sent(self) -> tuple[Tensor, Tensor]:
        """What the first stage takes, as it takes a bundle."""
        return Bundle(self.input_ids, self.planes).sent


def collate(
    rows: Sequence[Row | None], length: int, *, micro_batch: int, block_mask: bool, planes: tuple[str, ...] = READ
) -> list[MicroBatch]:
    """Rows → micro-batches of inputs [micro_batch, length]; None is a filling row, fully masked.

    All micro-batches of a step are made at once, so that the cost of numpy's calls is paid once for a step.
    """
    shape = (len(rows) // micro_batch, micro_batch, length)
    input_ids = np.empty(shape, dtype=np.int64)
    stacked = np.empty((shape[0], len(planes), *shape[1:]), dtype=np.int64)
    labels, position_ids = (stacked[:, planes.index(name)] for name in (LABELS, POSITION_IDS))
    for place, row in enumerate(rows):
        number, within = divmod(place, micro_batch)
        inputs = trained = 0
        if row is not None and len(row.ids) > 1:
            inputs, trained = len(row.ids) - 1, max(row.real_length - 1, 0)
            input_ids[number, within, :inputs] = row.ids[:-1]
            labels[number, within, :trained] = (row.ids if row.labels is None else row.labels)[1 : trained + 1]
        input_ids[number, within, inputs:] = 0
        labels[number, within, trained:] = IGNORE_INDEX
    row_of, starts = _document_starts(rows, length)
    later = starts > 0
    batch_of, place_of = np.divmod(row_of[later], micro_batch)
    labels[batch_of, place_of, starts[later] - 1] = IGNORE_INDEX
    if CONTROL_CLASS in planes:
        _fill_classes(stacked[:, planes.index(CONTROL_CLASS)], rows, labels)
    counts: list[tuple[int, ...]] = [()] * shape[0]
    if DOCUMENTS in planes:
        counts = _fill_documents(stacked[:, planes.index(DOCUMENTS)], rows)
    positions = np.arange(input_ids.size).reshape(shape)
    if block_mask:
        # Each position less the start of its document; padding continues the last document.
        edges = np.append(row_of * length + starts, input_ids.size)
        np.subtract(positions, np.repeat(edges[:-1], edges[1:] - edges[:-1]).reshape(shape), out=position_ids)
    else:
        position_ids[:] = positions[0, 0]
    return [
        MicroBatch(input_ids=torch.from_numpy(ids), planes=Planes(planes, torch.from_numpy(numbers)), documents=count)
        for ids, numbers, count in zip(input_ids, stacked, counts, strict=True)
    ]


def as_numbers(micro_batches: Sequence[MicroBatch]) -> Tensor:
    """Micro-batches as one flat tensor, to be sent; `from_numbers` is the inverse."""
    found = [torch.tensor([len(micro_batches)])]
    for each in micro_batches:
        found += [torch.tensor(each.input_ids.shape), each.input_ids.flatten(), each.planes.stacked.flatten()]
    return torch.cat(found)


def from_numbers(numbers: Tensor, planes: tuple[str, ...]) -> list[MicroBatch]:
    """The micro-batches that `as_numbers` made, which have these planes; views."""
    found, place = [], 1
    for _ in range(int(numbers[0])):
        batch, length = numbers[place : place + 2].tolist()
        ids = numbers[place + 2 : place + 2 + batch * length].view(batch, length)
        place += 2 + ids.numel()
        stacked = numbers[place : place + len(planes) * ids.numel()].view(len(planes), batch, length)
        place += stacked.numel()
        found.append(MicroBatch(input_ids=ids, planes=Planes(planes, stacked)))
    return found


def _fill_classes(classes: Int64, rows: Sequence[Row | None], labels: Int64) -> None:
    """Control classes [M, B, S] beside the labels: of the token that follows, 0 where that is no target."""
    classes[:] = 0
    for place, row in enumerate(rows):
        if row is not None and row.classes is not None:
            number, within = divmod(place, classes.shape[1])
            classes[number, within, : max(len(row.classes) - 1, 0)] = row.classes[1:]
    classes[labels == IGNORE_INDEX] = 0


def _fill_documents(plane: Int64, rows: Sequence[Row | None]) -> list[tuple[int, ...]]:
    """Number the documents of each micro-batch [M, B, S], and put what is known of each beside the number at its first
    token: the bits of its reference log-probability. Padding goes on with the last document. How many each row has."""
    plane[:] = 0
    counts: list[tuple[int, ...]] = []
    for number, micro_batch in enumerate(plane):
        first, found = 0, []
        for place, numbers in enumerate(micro_batch):
            row = rows[number * len(micro_batch) + place]
            size = len(row.boundaries) - 1 if row is not None and row.boundaries is not None else 0
            found.append(size)
            if row is None or row.boundaries is None:
                continue
            starts = row.boundaries[:-1]
            numbers[:] = np.repeat(np.arange(first, first + size), np.diff(np.append(starts, len(numbers))))
            if row.references is not None:
                numbers[starts] |= row.references.view(np.int32).astype(np.int64) << 32
            first += size
        counts.append(tuple(found))
    return counts


def _document_starts(rows: Sequence[Row | None], length: int) -> tuple[Int64, Int64]:
    """For each document of a batch, in order: its row, and where in the row it starts.

    Every row has a document at 0, also if it is empty. A start at `length`, just beyond the inputs, is there too: the
    last token of a row as long as it may be is a target and never an input.
    """
    one = np.zeros(1, dtype=np.int32)
    parts = [
        one if row is None or row.boundaries is None or len(row.boundaries) < 2 else row.boundaries[:-1] for row in rows
    ]
    starts = np.concatenate(parts)
    row_of = np.repeat(np.arange(len(rows)), [len(part) for part in parts])
    kept = starts <= length  # an empty document at the very end starts beyond
    return row_of[kept], starts[kept].astype(np.int64)
