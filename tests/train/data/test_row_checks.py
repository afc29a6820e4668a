"""Rows that cannot be trained on are named by their place."""

import numpy as np
import pytest

from jllm.data.packing.pair_rows import row_checksum
from jllm.train.data.row_checks import RowError, check_classes, checked_pairs
from jllm.train.data.rows import Row

IDS = np.arange(6, dtype=np.int32)
BOUNDS = np.array([0, 3, 6], np.int32)
LABELS = np.array([-100, 1, 2, -100, 4, 5], np.int32)


def test_pairs() -> None:
    row = Row(ids=IDS, labels=LABELS, boundaries=BOUNDS)
    assert checked_pairs([row, row], references=False) == [1, 1]
    with pytest.raises(RowError, match="not a row of preference pairs") as error:
        checked_pairs([row, Row(ids=IDS, labels=LABELS, boundaries=None)], references=False)
    assert error.value.place == 1
    with pytest.raises(RowError, match="no ref_logps"):
        checked_pairs([row], references=True)
    row.references, row.checksum = np.zeros(2, np.float32), row_checksum(IDS, LABELS, BOUNDS)
    assert checked_pairs([row], references=True) == [1]


def test_classes() -> None:
    check_classes([Row(ids=IDS, labels=None, boundaries=None, classes=np.sign(IDS))])
    with pytest.raises(RowError, match="no control classes"):
        check_classes([Row(ids=IDS, labels=None, boundaries=None)])
    with pytest.raises(RowError, match="control class 5"):
        check_classes([Row(ids=IDS, labels=None, boundaries=None, classes=IDS.clip(max=1) + 4 * (IDS == 5))])
