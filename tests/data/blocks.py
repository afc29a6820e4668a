"""Encoded documents in blocks on disk, and row groups made of them in this process."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

from jllm.data.packing.documents import Documents
from jllm.data.packing.packers import Packer
from jllm.data.packing.pieces import Block, Plan
from jllm.data.prepare.encoding import Encoded
from jllm.data.prepare.holdout import Holdout
from jllm.data.prepare.saving.chunk_cache import ChunkCache, Place
from jllm.data.prepare.saving.sink import ResumePoint, Sink
from jllm.data.prepare.saving.writer import Made
from jllm.data.prepare.work import GroupTask, Work
from jllm.forks import Slots


def block_of(folder: Path, documents: Documents, place: Place) -> Block:
    """Save documents of few different ids as a chunk."""
    encoded = Encoded(documents=documents, bad=[], counts={}, end=0, end_line=1)
    return ChunkCache(folder, vocab_size=1 << 20, sinks=["main"]).save(place, encoded)


class Inline:
    """Makes row groups at once, each in memory of its own."""

    def __init__(self, folder: Path, packer: Packer) -> None:
        cache = ChunkCache(folder, vocab_size=1 << 20, sinks=["main"])
        nobody = Holdout(fraction=None, seed=0)
        self.packer = packer
        self._folder = folder
        self._slots = Slots(1 << 10, 1 << 16)
        self._work = Work(None, cache, nobody, packer, codec="zstd", made=self._slots)  # type: ignore[arg-type]

    def make(self, plans: Sequence[Plan], done: Callable[[Made], None]) -> None:
        slot = self._slots.take()
        assert slot is not None
        group = self._work.group(GroupTask(tuple(plans), slot))
        data = self._slots.memory(slot, group.size) if group.file is None else memoryview(group.file.read_bytes())
        done(Made(group, data, lambda: self._slots.give_back(slot)))

    def feed(self, sink: Sink, point: ResumePoint, stem: str, documents: Documents) -> None:
        """Feed documents to a sink as a chunk."""
        sink.feed(point, stem, block_of(self._folder, documents, point.place), self.packer.pieces(documents))


def planned_rows(
    folder: Path, packer: Packer, parts: Sequence[Documents], cuts: Sequence[int]
) -> list[dict[str, list[int]]]:
    """The rows of documents that come in parts, made of plans that are cut at these rows."""
    planner = packer.planner()
    plans = []
    for number, part in enumerate(parts):
        pieces = packer.pieces(part)
        plans.append(planner.feed(block_of(folder, part, (0, number)), pieces, number))
    plans += planner.finish()
    rows = []
    for plan in plans:
        if plan is None:
            continue
        places = sorted({0, len(plan), *(cut % (len(plan) + 1) for cut in cuts)})
        for begin, end in itertools.pairwise(places):
            cut = plan.slice(begin, end)
            batch = packer.rows(cut, cut.documents())
            assert [len(ids) for ids in batch.column("input_ids").to_pylist()] == cut.lengths.tolist()
            rows += batch.to_pylist()
    return rows
