"""A row of pairs is one, or says why not; references are of this row, or not taken."""

import numpy as np
import pytest

from jllm.data.packing.pair_rows import pairs_of, reference_mismatch, row_checksum

IDS = np.arange(10, dtype=np.int32)
LABELS = np.array([-100, 1, 2, -100, 4, -100, 6, -100, 8, 9], dtype=np.int32)
BOUNDS = np.array([0, 3, 5, 7, 9], dtype=np.int32)


def test_pairs() -> None:
    assert pairs_of(LABELS, BOUNDS) == 2
    for labels, bounds, said in (
        (None, BOUNDS, "4 documents without labels"),
        (LABELS, None, "1 documents"),
        (LABELS, BOUNDS[:-1], "3 documents"),
        (np.where(LABELS == 4, -100, LABELS).astype(np.int32), BOUNDS, "nothing of its document 1 is trained on"),
        (np.where(np.arange(10) == 3, 3, np.where(LABELS == 4, -100, LABELS)).astype(np.int32), BOUNDS, "document 1"),
    ):
        with pytest.raises(ValueError, match=said):
            pairs_of(labels, bounds)


def test_checksums_are_of_all_but_the_padding() -> None:
    first = row_checksum(IDS, LABELS, BOUNDS)
    assert -(2**31) <= first < 2**31
    longer = [np.append(each, np.int32(7)) for each in (IDS, LABELS)]
    assert row_checksum(*longer, BOUNDS) == first
    for place in range(9):
        other = LABELS.copy()
        other[place] = 50
        assert row_checksum(IDS, other, BOUNDS) != first
    assert row_checksum(IDS, LABELS, np.array([0, 3, 6, 7, 9], np.int32)) != first


def test_references() -> None:
    numbers, good = np.array([-1, -2, -3, -4], np.float32), row_checksum(IDS, LABELS, BOUNDS)
    assert reference_mismatch(IDS, LABELS, BOUNDS, numbers, good) is None
    for given, checksum, said in (
        (None, good, "no ref_logps for 4"),
        (numbers[:3], good, "3 ref_logps for 4"),
        (numbers, None, "other tokens or labels"),
        (numbers, good ^ 1, "other tokens or labels"),
        (np.where(numbers == -2, np.inf, numbers).astype(np.float32), good, "not finite"),
    ):
        found = reference_mismatch(IDS, LABELS, BOUNDS, given, checksum)
        assert found is not None
        assert said in found
