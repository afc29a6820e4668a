"""The order of an epoch: every row once, whatever the row groups; found at once; never the same by accident."""

import os

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jllm.train.data.order import EpochOrder, epoch_order

SIZE = float(os.environ.get("JLLM_TEST_SIZE", "1"))
EXAMPLES = max(20, int(100 * SIZE))
FINGERPRINT = "0123456789abcdef" * 4


def order_of(
    rows: list[int], *, window: int = 40, seed: int = 1, epoch: int = 0, shuffle: bool = True, data: str = FINGERPRINT
) -> EpochOrder:
    """An order of row groups of these numbers of rows, four bytes a row."""
    counts = np.array(rows, dtype=np.int64)
    return epoch_order(
        counts, 4 * counts, fingerprint=data, seed=seed, epoch=epoch, shuffle=shuffle, window_bytes=window
    )


def walk(order: EpochOrder, rows: list[int]) -> list[tuple[int, int, int]]:
    """(window, place in its order, number of the row in the files) of every row, by brute force."""
    first_row = np.concatenate([[0], np.cumsum(rows)])
    walked = []
    for window in range(order.num_windows):
        numbers = [
            int(first_row[group]) + row
            for group in order.groups_of_window(window).tolist()
            for row in range(rows[group])
        ]
        for place, chosen in enumerate(order.rows_of_window(window).tolist()):
            walked.append((window, place, numbers[chosen]))
    return walked


layouts = st.lists(st.integers(1, 12), min_size=1, max_size=30)
windows = st.integers(1, 400)


@settings(max_examples=EXAMPLES, deadline=None)
@given(rows=layouts, window=windows, seed=st.integers(0, 2**63), epoch=st.integers(0, 1000), shuffle=st.booleans())
def test_every_row_once(rows: list[int], window: int, seed: int, epoch: int, shuffle: bool) -> None:
    order = order_of(rows, window=window, seed=seed, epoch=epoch, shuffle=shuffle)
    numbers = [number for _, _, number in walk(order, rows)]
    assert order.num_rows == sum(rows)
    assert sorted(numbers) == list(range(sum(rows)))
    if not shuffle:
        assert numbers == sorted(numbers)


@settings(max_examples=EXAMPLES, deadline=None)
@given(rows=layouts, window=windows, seed=st.integers(0, 1000), shuffle=st.booleans())
def test_find_agrees_with_a_walk(rows: list[int], window: int, seed: int, shuffle: bool) -> None:
    order = order_of(rows, window=window, seed=seed, shuffle=shuffle)
    assert [order.find(row) for row in range(order.num_rows)] == [(w, p) for w, p, _ in walk(order, rows)]


@settings(max_examples=EXAMPLES, deadline=None)
@given(rows=layouts, window=windows)
def test_a_window_is_closed_by_the_group_that_fills_it(rows: list[int], window: int) -> None:
    order = order_of(rows, window=window)
    sizes = [4 * int(sum(rows[g] for g in order.groups_of_window(w).tolist())) for w in range(order.num_windows)]
    last_groups = [4 * rows[int(order.groups_of_window(w)[-1])] for w in range(order.num_windows)]
    assert all(size >= window for size in sizes[:-1])
    assert all(size - last < window for size, last in zip(sizes, last_groups, strict=True))


def test_epochs_seeds_and_data_each_give_another_order() -> None:
    """Seed 42 in epoch 1 is not seed 43 in epoch 0, as it would be if they were added."""
    rows = [5] * 40
    keys = [(seed, epoch, data) for seed in (42, 43, 44) for epoch in (0, 1, 2) for data in ("a" * 64, "b" * 64)]
    orders = [
        [n for _, _, n in walk(order_of(rows, seed=s, epoch=e, data=data, window=200), rows)] for s, e, data in keys
    ]
    assert len({tuple(order) for order in orders}) == len(keys)
    groups = {tuple(order_of(rows, seed=s, epoch=e, data=data).groups.tolist()) for s, e, data in keys}
    assert len(groups) == len(keys)


def test_windows_of_one_epoch_are_permuted_independently() -> None:
    order = order_of([10] * 8, window=40)
    permutations = [tuple(order.rows_of_window(window).tolist()) for window in range(order.num_windows)]
    assert len(permutations) == 8
    assert len(set(permutations)) == 8


def test_without_shuffling_epochs_are_the_same() -> None:
    rows = [3, 1, 4]
    orders = [[n for _, _, n in walk(order_of(rows, epoch=e, shuffle=False), rows)] for e in (0, 1, 7)]
    assert orders == [list(range(8))] * 3


def test_the_end_of_an_epoch_and_an_empty_one() -> None:
    order = order_of([3, 2])
    assert order.find(5)[0] == order.num_windows - 1
    empty = order_of([])
    assert (empty.num_rows, empty.num_windows, empty.find(0)) == (0, 0, (0, 0))
