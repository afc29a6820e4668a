"""Whatever a packer makes of documents, each token has its document's class, and padding and prefixes have 0."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jllm.data.dataset.columns import IGNORE_INDEX
from jllm.data.packing.best_fit import BestFitPacker
from jllm.data.packing.classes import ClassPacker
from jllm.data.packing.conversations import ConversationPacker
from jllm.data.packing.documents import Documents
from jllm.data.packing.packers import Packer, StackPacker, WindowPacker

LENGTH = 9
PREFIX, PAD = 1, 2
"""Ids that no document has."""


def made(kind: str, *, twin: bool) -> Packer:
    prefix, pad = ((0,), 0) if twin else ((PREFIX,), PAD)
    packers: dict[str, Any] = {
        "stack": lambda: StackPacker(LENGTH, labels=True),
        "stack, prefix": lambda: StackPacker(LENGTH, prefix=prefix),
        "windows": lambda: WindowPacker(LENGTH, stride=4),
        "windows, prefix": lambda: WindowPacker(LENGTH, prefix=prefix, drop_tail=True),
        "conversations": lambda: ConversationPacker(LENGTH, filter_rows=True),
        "conversations, padded": lambda: ConversationPacker(LENGTH, pad_to=4, pad_id=pad),
        "best fit": lambda: BestFitPacker(LENGTH, labels=True, pad_to=4, pad_id=pad),
        "best fit of conversations": lambda: BestFitPacker(LENGTH, labels=True, conversations=True),
    }
    packer: Packer = packers[kind]()
    return packer


KINDS = ["stack", "stack, prefix", "windows", "windows, prefix", "conversations", "conversations, padded", "best fit",
         "best fit of conversations"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    seed=st.integers(0, 1 << 20),
    cuts=st.lists(st.integers(0, 12), max_size=3),
    alike=st.booleans(),
)
def test_every_token_has_its_documents_class(
    kind: str, lengths: list[int], seed: int, cuts: list[int], alike: bool
) -> None:
    """Documents come in several chunks; between two of them the packer goes on from its state."""
    rng = np.random.default_rng(seed)
    classes = np.full(len(lengths), 1, np.int8) if alike else rng.integers(-1, 2, len(lengths)).astype(np.int8)
    # The id says which document it is of: 10, 11, ...
    ids = np.repeat(np.arange(10, 10 + len(lengths)), lengths).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    labels = np.where(rng.random(len(ids)) < 0.4, IGNORE_INDEX, ids).astype(np.int32)
    documents = Documents(ids=ids, offsets=offsets, labels=labels, classes=classes)
    is_chat = "conversations" in kind
    packer = ClassPacker(made(kind, twin=False), made(kind, twin=True), labels=is_chat)
    plain = made(kind, twin=False)
    found, expected = [], []
    bounds = sorted({0, len(lengths), *(cut for cut in cuts if cut < len(lengths))})
    for start, end in itertools.pairwise(bounds):
        if not packer.whole:
            state = packer.state()
            packer = ClassPacker(made(kind, twin=False), made(kind, twin=True), labels=is_chat)
            packer.restore(state)
        found.append(packer.feed(documents.slice(start, end)))
        expected.append(plain.feed(documents.slice(start, end)))
    found, expected = [*found, *packer.finish()], [*expected, *plain.finish()]
    rows = [row for batch in found if batch is not None for row in batch.to_pylist()]
    without = [{name: value for name, value in row.items() if name != "control_class"} for row in rows]
    assert without == [row for batch in expected if batch is not None for row in batch.to_pylist()]
    for row in rows:
        wanted = [int(classes[token - 10]) if token >= 10 else 0 for token in row["input_ids"]]
        assert row["control_class"] == wanted
