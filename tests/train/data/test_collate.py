"""Rows to micro-batches: as a walk over the tokens gives them, one by one."""

import os
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jllm.models.pipeline.bundle import DOCUMENTS, LABELS, POSITION_IDS
from jllm.train.data.collate import MicroBatch, collate
from jllm.train.data.rows import Row
from jllm.train.objectives.preference import unpacked_documents

EXAMPLES = max(10, int(50 * float(os.environ.get("JLLM_TEST_SIZE", "1"))))


def reference_row(row: Row | None, length: int, block_mask: bool) -> tuple[list[int], list[int], list[int]]:
    """One row, token by token."""
    ids, targets, positions = [0] * length, [-100] * length, list(range(length))
    if row is None:
        return ids, targets, positions
    starts = set() if row.boundaries is None else set(row.boundaries[1:-1].tolist())
    labels = row.ids if row.labels is None else row.labels
    start = 0
    for at in range(length):
        start = at if at in starts else start
        positions[at] = at - start if block_mask else at
        if at + 1 < len(row.ids):
            ids[at] = int(row.ids[at])
            if at + 1 < row.real_length and at + 1 not in starts:
                targets[at] = int(labels[at + 1])
    return ids, targets, positions


@st.composite
def collations(draw: Any) -> tuple[list[Row | None], int, int]:
    """Rows of 0 to length + 1 tokens, some filling, with documents that may be empty, and padding."""
    length, micro_batch = draw(st.integers(1, 12)), draw(st.integers(1, 3))
    rows: list[Row | None] = []
    for _ in range(micro_batch * draw(st.integers(1, 3))):
        count = draw(st.integers(-1, length + 1))
        if count < 0:
            rows.append(None)
            continue
        ids = np.array(draw(st.lists(st.integers(1, 50), min_size=count, max_size=count)), dtype=np.int32)
        masked = np.array(draw(st.lists(st.booleans(), min_size=count, max_size=count)), dtype=bool)
        labels = np.where(masked, -100, ids).astype(np.int32) if draw(st.booleans()) else None
        boundaries = None
        if draw(st.booleans()):
            end = draw(st.integers(0, count))
            cuts = sorted(draw(st.lists(st.integers(0, end), max_size=4)))
            boundaries = np.array([0, *cuts, end] if end or cuts else [0], dtype=np.int32)
        rows.append(Row(ids=ids, labels=labels, boundaries=boundaries))
    return rows, length, micro_batch


@settings(max_examples=4 * EXAMPLES, deadline=None)
@given(given_rows=collations(), block_mask=st.booleans())
def test_collate_equals_a_walk_over_the_tokens(given_rows: tuple[list[Row | None], int, int], block_mask: bool) -> None:
    rows, length, micro_batch = given_rows
    batches = collate(rows, length, micro_batch=micro_batch, block_mask=block_mask)
    found = [
        (ids.tolist(), targets.tolist(), positions.tolist())
        for batch in batches
        for ids, targets, positions in zip(
            batch.input_ids, batch.planes[LABELS], batch.planes[POSITION_IDS], strict=True
        )
    ]
    assert found == [reference_row(row, length, block_mask) for row in rows]


def one_batch(*rows: dict[str, list[int]], length: int, block_mask: bool = True) -> MicroBatch:
    made = [Row(*(np.array(r[k], np.int32) if k in r else None for k in ("ids", "labels", "ends"))) for r in rows]  # type: ignore[arg-type]
    return collate(list(made), length, micro_batch=len(made), block_mask=block_mask)[0]


def test_collate_by_hand() -> None:
    """Two documents and one token of padding; the second document's first token is no target."""
    batch = one_batch(
        {"ids": [11, 12, 13, 21, 22, 99], "labels": [11, -100, 13, 21, 22, 99], "ends": [0, 3, 5]}, length=6
    )
    assert batch.input_ids.tolist() == [[11, 12, 13, 21, 22, 0]]
    assert batch.planes[LABELS].tolist() == [[-100, 13, -100, 22, -100, -100]]
    assert batch.planes[POSITION_IDS].tolist() == [[0, 1, 2, 0, 1, 2]]


def test_an_empty_last_document_of_a_full_row() -> None:
    batch = one_batch({"ids": [1, 2, 3], "ends": [0, 2, 3, 3]}, length=2)
    assert batch.planes.stacked.tolist() == [[[2, -100]], [[0, 1]]]


def test_documents_of_pairs() -> None:
    """Numbered through a micro-batch, with the bits of what is known of each at its first token."""
    one = Row(ids=np.arange(7, dtype=np.int32), labels=np.arange(7, dtype=np.int32),
              boundaries=np.array([0, 3, 5], np.int32), references=np.array([-1.5, -7.25], np.float32))  # fmt: skip
    two = Row(ids=np.arange(9, dtype=np.int32), labels=np.arange(9, dtype=np.int32),
              boundaries=np.array([0, 2, 4, 6, 9], np.int32), references=np.full(4, -2.0, np.float32))  # fmt: skip
    planes = (LABELS, POSITION_IDS, DOCUMENTS)
    first, second = collate([one, two, None, one], 8, micro_batch=2, block_mask=True, planes=planes)
    numbers, references = unpacked_documents(first.planes[DOCUMENTS])
    assert numbers.tolist() == [[0, 0, 0, 1, 1, 1, 1, 1], [2, 2, 3, 3, 4, 4, 5, 5]]
    assert references.tolist() == [[-1.5, 0, 0, -7.25, 0, 0, 0, 0], [-2, 0, -2, 0, -2, 0, -2, 0]]
    assert first.documents == (2, 4)
    numbers, references = unpacked_documents(second.planes[DOCUMENTS])
    assert numbers.tolist() == [[0] * 8, [0, 0, 0, 1, 1, 1, 1, 1]]
    assert not references[0].any()
    assert second.documents == (0, 2)
