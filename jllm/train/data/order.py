"""The order in which the rows of a data set are trained on: pure functions of (fingerprint, seed, epoch).

An epoch reads the row groups of the data set in a random order. Consecutive groups form windows of about
`window_bytes`; the rows of a window are permuted among themselves. So a reader holds one window in memory and any
row of the epoch can be reached by reading one window. Together with the global shuffle made on disk beforehand this
reorders every epoch; without shuffling the order is that of the files.

Nothing here depends on the number of workers, ranks or rows consumed: those only say where in the order one stands.

    row groups (rows)      g0(3) g1(2) g2(2) g3(3)
    groups of the epoch    g2 g0 g3 g1
    windows                [g2 g0] [g3 g1]
    rows of window 0       a permutation of g2r0 g2r1 g0r0 g0r1 g0r2

Cost: 16 bytes for each row group.
"""

import dataclasses

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpochOrder:
    """One epoch.

    Attributes:
        groups: [G] indices of the row groups, in reading order.
        window_starts: [W + 1] positions in `groups` where windows start; the last is G.
        rows_before: [W + 1] rows of the epoch before each window; the last is the number of rows.
        shuffled: whether rows are permuted within their window.
        key: what the permutations are drawn from.
    """

    groups: Int64
    window_starts: Int64
    rows_before: Int64
    shuffled: bool
    key: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        return int(self.rows_before[-1])

    @property
    def num_windows(self) -> int:
        return len(self.window_starts) - 1

    def groups_of_window(self, window: int) -> Int64:
        """The row groups of a window, in the order in which its rows are numbered."""
        return self.groups[self.window_starts[window] : self.window_starts[window + 1]]

    def rows_of_window(self, window: int) -> Int64:
        """The order of a window's rows: positions in the concatenation of its groups."""
        count = int(self.rows_before[window + 1] - self.rows_before[window])
        if not self.shuffled:
            return np.arange(count)
        return self.generator(1, window).permutation(count)

    def generator(self, *purpose: int) -> np.random.Generator:
        """Random numbers of this epoch for one purpose; without shuffling they are those of every epoch."""
        return _generator(*(self.key if self.shuffled else (*self.key[:-1], 0)), *purpose)

    def find(self, row: int) -> tuple[int, int]:
        """The window that holds row number `row` of the epoch, and the row's place in that window's order."""
        assert 0 <= row <= self.num_rows
        window = min(int(np.searchsorted(self.rows_before, row, side="right")) - 1, max(self.num_windows - 1, 0))
        return window, row - int(self.rows_before[window])


def epoch_order(
    rows: Int64,
    sizes: Int64,
    *,
    fingerprint: str,
    seed: int,
    epoch: int,
    shuffle: bool,
    window_bytes: int,
    pieces: Int64 | None = None,
) -> EpochOrder:
    """The order of one epoch.

    Args:
        rows: [G] number of rows of each row group, in the order of the data set's files.
        sizes: [G] bytes of each row group in memory.
        pieces: where a row group is too large for a window, it has several entries in `rows` and `sizes`, and in the
            result, where they stay together and in order: the number of entries of each row group; None: one each.
        fingerprint: the data set's, in hex.
        seed: the run's.
        epoch: from 0.
        shuffle: False keeps the order of the files, in every epoch.
        window_bytes: a window is closed by the group that reaches this size.
    """
    # SeedSequence mixes its words, so that seed 42 in epoch 1 and seed 43 in epoch 0 are unrelated.
    key = (int(fingerprint[:16], 16), seed, epoch)
    groups = np.arange(len(rows))
    if shuffle:
        counts = np.ones_like(rows) if pieces is None else pieces
        permuted = _generator(*key, 0).permutation(len(counts))
        firsts, counts = (np.cumsum(counts) - counts)[permuted], counts[permuted]
        groups += np.repeat(firsts - (np.cumsum(counts) - counts), counts)
    starts = [0]
    filled = 0
    for position, size in enumerate(sizes[groups].tolist()):
        filled += size
        if filled >= window_bytes:
            starts.append(position + 1)
            filled = 0
    if starts[-1] != len(groups):
        starts.append(len(groups))
    window_starts = np.array(starts, dtype=np.int64)
    rows_before = np.concatenate([[0], np.cumsum(rows[groups])]).astype(np.int64)[window_starts]
    return EpochOrder(groups=groups, window_starts=window_starts, rows_before=rows_before, shuffled=shuffle, key=key)


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(list(key))))
