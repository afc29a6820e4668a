"""Where every row of a shuffle goes: the permutation, the blocks, and the buckets on the way. Pure functions."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jllm.data.shuffle.scatter import Positions


def destinations(rows: int, *, fingerprint: str, seed: int) -> Positions:
    """A uniform random permutation of `range(rows)`: the output position of every input row."""
    entropy = [seed, *np.frombuffer(bytes.fromhex(fingerprint), dtype=">u4").tolist()]
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))
    positions: Positions = np.arange(rows, dtype=np.dtype(np.uint32 if rows <= 1 << 32 else np.uint64))
    generator.shuffle(positions)
    return positions


def block_edges(rows: int, blocks: int) -> list[int]:
    """Block k holds the positions from edge k up to edge k + 1."""
    return [block * rows // blocks for block in range(blocks + 1)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unit:
    """Work for one worker of the second pass: whole blocks, and the buckets that hold exactly their rows."""

    blocks: range
    buckets: range


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShuffleLayout:
    """How positions are cut into buckets, and buckets and blocks into units. It has no influence on the output."""

    bounds: Positions
    units: tuple[Unit, ...]


def lay_out(edges: Sequence[int], rows_per_bucket: int) -> ShuffleLayout:
    """Large blocks get several buckets each; small blocks share one."""
    bounds: list[int] = []
    units: list[Unit] = []
    block, blocks = 0, len(edges) - 1
    while block < blocks:
        end = block + 1
        while end < blocks and edges[end + 1] - edges[block] <= rows_per_bucket:
            end += 1
        size = edges[end] - edges[block]
        buckets = max(1, -(-size // rows_per_bucket))
        units.append(Unit(blocks=range(block, end), buckets=range(len(bounds), len(bounds) + buckets)))
        bounds.extend(edges[block] + size * bucket // buckets for bucket in range(buckets))
        block = end
    return ShuffleLayout(bounds=np.array(bounds, dtype=np.int64), units=tuple(units))
