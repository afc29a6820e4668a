"""Row groups are written in the order in which they were begun, and files finished one after the other."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jllm.data.dataset.manifest import FileEntry
from jllm.data.dataset.reader import ShardReader
from jllm.data.dataset.shards import ShardWriter
from jllm.data.packing.packers import WindowPacker
from jllm.data.prepare.saving.writer import Made, Writer
from tests.data.blocks import Inline, block_of
from tests.data.packed_rows import documents_of

PACKER = WindowPacker(9)


def groups(folder: Path, count: int) -> list[Made]:
    """Row groups of one row each, of 1, 2, 3, ... tokens."""
    inline = Inline(folder, PACKER)
    found: list[Made] = []
    for number in range(count):
        documents = documents_of([number % 8 + 1])
        planner = PACKER.planner()
        plan = planner.feed(block_of(folder, documents, (0, number)), PACKER.pieces(documents), None)
        assert plan is not None
        inline.make([plan], found.append)
    return found


def rows_of(path: Path) -> list[int]:
    return [len(row) for batch in ShardReader(path) for row in batch.column("input_ids").to_pylist()]


def test_groups_come_in_any_order(tmp_path: Path) -> None:
    made = groups(tmp_path, 24)
    noted: list[tuple[FileEntry | None, Any]] = []
    writer = Writer(tmp_path / "out", tmp_path, PACKER, "zstd", lambda entry, mark: noted.append((entry, mark)))
    writer.start()
    done: list[tuple[int, Callable[[Made], None]]] = []
    for number in range(24):
        done.append((number, writer.group("a-00000", number // 10)))
        if number % 10 == 9:
            writer.end_file(number)
    assert writer.is_waiting
    random.Random(3).shuffle(done)
    for number, call in done:
        call(made[number])
    writer.end_file("last")
    assert not writer.is_waiting
    writer.stop()
    writer.check()
    assert [mark for _, mark in noted] == [9, 19, "last"]
    assert [entry.rows for entry, _ in noted if entry is not None] == [10, 10, 4]
    paths = [tmp_path / "out" / entry.path for entry, _ in noted if entry is not None]
    assert [length for path in paths for length in rows_of(path)] == [number % 8 + 1 for number in range(24)]


def test_a_file_that_has_not_ended_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "blocks").mkdir()
    (made,) = groups(tmp_path / "blocks", 1)
    writer = Writer(tmp_path / "out", tmp_path, PACKER, "zstd", lambda *_: None)
    writer.start()
    writer.group("a-00000", 0)(made)
    writer.stop()
    writer.check()
    assert [path.name for path in tmp_path.iterdir()] == ["blocks"]


def test_what_is_finished_stays_where_a_later_file_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = groups(tmp_path, 2)
    append = ShardWriter.append

    def full(self: ShardWriter, *group: Any) -> None:
        if self.path.name.startswith("a-00000-00001"):
            raise OSError(28, "No space left on device")
        append(self, *group)

    monkeypatch.setattr(ShardWriter, "append", full)
    noted: list[Any] = []
    writer = Writer(tmp_path / "out", tmp_path, PACKER, "zstd", lambda _, mark: noted.append(mark))
    writer.start()
    for number, made in enumerate((first, second)):
        writer.group("a-00000", number)(made)
        writer.end_file(number)
    writer.stop()
    assert noted == [0]
    with pytest.raises(OSError, match="No space"):
        writer.check()
