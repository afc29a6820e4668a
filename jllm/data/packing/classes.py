"""Control classes beside rows: the column `control_class`, the class of its document for each token.

A second packer of the same kind is fed documents whose ids are their classes, so that what it makes lies as the rows
of the first one do, however these are cut, joined and padded.

Guarantees: padding, and what every row starts with, has class 0. Cost: packing twice; where `best_fit` waits for a
whole split whose classes differ within a chunk, a byte for each token.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from jllm.data.dataset.columns import CONTROL_CLASS, INPUT_IDS, Column, schema
from jllm.data.packing.documents import Documents
from jllm.data.packing.packers import Packer
from jllm.data.packing.pieces import Pieces, Plan
from jllm.data.packing.planners import Planner

_MINE = "class_"
"""Before what the second packer has in a state."""


class ClassPacker:
    """Rows with control classes.

    Args:
        rows: packs the documents.
        classes: of the same kind, with 0 for padding and in the place of every id that rows start with.
        labels: how documents are cut depends on their labels.
    """

    further: tuple[Column, ...] = (CONTROL_CLASS,)

    def __init__(self, rows: Packer, classes: Packer, *, labels: bool) -> None:
        self._rows, self._classes, self._labels = rows, classes, labels
        self.whole, self.columns = rows.whole, rows.columns

    def feed(self, documents: Documents) -> pa.RecordBatch | None:
        rows = self._rows.feed(documents)
        classes = self._classes.feed(
            Documents(
                ids=_of_tokens(documents),
                offsets=documents.offsets,
                labels=documents.labels if self._labels else None,
            )
        )
        if rows is None or classes is None:
            assert rows is classes
            return None
        return self._together(rows, classes)

    def finish(self) -> Iterator[pa.RecordBatch]:
        for rows, classes in zip(self._rows.finish(), self._classes.finish(), strict=True):
            yield self._together(rows, classes)

    def pieces(self, documents: Documents) -> Pieces:
        return self._rows.pieces(documents)

    def planner(self) -> Planner:
        return self._rows.planner()

    def rows(self, plan: Plan, documents: Documents) -> pa.RecordBatch:
        classes = dataclasses.replace(documents, ids=_of_tokens(documents), classes=None)
        return self._together(self._rows.rows(plan, documents), self._classes.rows(plan, classes))

    def _together(self, rows: pa.RecordBatch, classes: pa.RecordBatch) -> pa.RecordBatch:
        return pa.RecordBatch.from_arrays(
            [*rows.columns, classes.column(INPUT_IDS)], schema=schema(self.columns, self.further)
        )

    def state(self) -> dict[str, Any]:
        return self._rows.state() | {_MINE + key: value for key, value in self._classes.state().items()}

    def restore(self, state: dict[str, Any]) -> None:
        self._rows.restore({key: value for key, value in state.items() if not key.startswith(_MINE)})
        self._classes.restore({key[len(_MINE) :]: value for key, value in state.items() if key.startswith(_MINE)})


def _of_tokens(documents: Documents) -> Any:
    """The class of each token; without memory where all are of one."""
    classes = documents.classes
    assert classes is not None
    count = len(documents.ids)
    if len(classes) and (classes == classes[0]).all():
        return np.broadcast_to(classes[:1], (count,))
    return np.repeat(classes, documents.lengths)
