"""Rows go to the bucket of their position and come back in order, through memory and disk alike."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jllm.data.shuffle.scatter import Bucket, Scatter
from tests.data.typed_sets import EVERY_TYPE, exact_rows, typed_rows
from tests.odd_files import files_of_at_most

IDS = ("input_ids",)


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 60),
    bounds=st.lists(st.integers(1, 59), max_size=4, unique=True),
    workers=st.integers(1, 3),
    allowance=st.sampled_from([0, 500, 1 << 30]),
    compressed=st.booleans(),
    at_once=st.integers(1, 9),
)
def test_rows_come_back_in_order(
    tmp_path_factory: pytest.TempPathFactory,
    count: int,
    bounds: list[int],
    workers: int,
    allowance: int,
    compressed: bool,
    at_once: int,
) -> None:
    folder = tmp_path_factory.mktemp("scratch")
    rows = typed_rows(0, count, EVERY_TYPE, columns=IDS)
    positions = np.random.default_rng(count).permutation(count).astype(np.uint32)
    starts = np.array([0, *sorted(bounds)])
    scatters = []
    for worker in range(workers):
        scatter = Scatter(
            bounds=starts,
            wanted=np.ones(len(starts), bool),
            allowance=allowance,
            scratch=folder,
            worker=worker,
            compressed=compressed,
        )
        for start in range(worker * 5, count, workers * 5):
            scatter.add(rows.slice(start, 5), positions[start : start + 5])
        scatters.append(scatter)
    if allowance != 500:
        assert any(folder.iterdir()) == (allowance == 0)
    expected = exact_rows([rows])
    expected = [expected[row] for row in np.argsort(positions)]
    for bucket, (low, high) in enumerate(zip(starts, [*starts[1:], count], strict=True)):
        held = Bucket(
            slices=[one for scatter in scatters for one in scatter.slices.pop(bucket, [])],
            files=[scatter.files[bucket] for scatter in scatters if bucket in scatter.files],
        )
        if low >= count:
            assert not held.slices
            assert not held.files
            continue
        found = list(held.ordered().between(int(low), int(high), rows_at_once=at_once))
        assert all(batch.num_rows <= at_once for batch in found)
        assert exact_rows(found) == expected[low:high]
        assert not held.slices, "what was handed out is held no longer"


def test_rows_are_repeated_and_unwanted_ones_dropped(tmp_path: Path) -> None:
    rows = typed_rows(0, 4, EVERY_TYPE, columns=IDS)
    scatter = Scatter(
        bounds=np.array([0, 3]),
        wanted=np.array([True, False]),
        allowance=1 << 30,
        scratch=tmp_path,
        worker=0,
        compressed=False,
    )
    scatter.add(rows, np.array([4, 2, 0, 1, 3]), picks=np.array([0, 1, 1, 3, 3]))
    assert list(scatter.slices) == [0]
    held = Bucket(slices=scatter.slices[0], files=[])
    expected = exact_rows([rows])
    found = exact_rows(held.ordered().between(0, 3, rows_at_once=10))
    assert found == [expected[1], expected[3], expected[1]]


@pytest.mark.parametrize("size", [0, 1000])
def test_a_scratch_file_that_a_disk_does_not_take_is_named(tmp_path: Path, size: int) -> None:
    rows = typed_rows(0, 2000, EVERY_TYPE, columns=IDS)
    scatter = Scatter(
        bounds=np.array([0]), wanted=np.ones(1, bool), allowance=0, scratch=tmp_path, worker=3, compressed=False
    )
    with pytest.raises(OSError, match="too large") as caught, files_of_at_most(size):
        scatter.add(rows, np.arange(2000, dtype=np.uint32))
    assert caught.value.filename == str(tmp_path / "00000-003.arrows")
