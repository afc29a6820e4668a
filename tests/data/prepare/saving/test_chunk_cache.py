"""Encoded chunks on disk: they come back as they were, torn ones do not, and what no sink needs is removed."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jllm.data.packing.documents import Documents
from jllm.data.prepare.encoding import Encoded
from jllm.data.prepare.saving.chunk_cache import ChunkCache, read, write
from jllm.data.sources.records import BadRecord
from tests.odd_files import files_of_at_most

EXAMPLES = 40 * int(os.environ.get("JLLM_TEST_SIZE", "1"))


def encoded_of(rows: list[list[int]], labels: bool, bad: int = 0, *, classes: bool = False) -> Encoded:
    ids = np.array([index for row in rows for index in row], dtype=np.int32)
    offsets = np.r_[0, np.cumsum([len(row) for row in rows])].astype(np.int64)
    documents = Documents(ids=ids, offsets=offsets, labels=np.where(ids % 3, ids, -100).astype(np.int32))
    if not labels:
        documents = Documents(ids=ids, offsets=offsets)
    if classes:
        documents = dataclasses.replace(documents, classes=(np.arange(len(rows)) % 3 - 1).astype(np.int8))
    records = [BadRecord(kind="bad JSON", line=number, detail="é") for number in range(bad)]
    return Encoded(documents=documents, bad=records, counts={"records": len(rows) + bad}, end=7, end_line=8)


def same(one: Encoded, other: Encoded) -> bool:
    labels = [each.documents.labels for each in (one, other)]
    classes = [each.documents.classes for each in (one, other)]
    return (
        np.array_equal(*(each if each is not None else [-9] for each in classes))
        and np.array_equal(one.documents.ids, other.documents.ids)
        and np.array_equal(one.documents.offsets, other.documents.offsets)
        and (labels[0] is None) == (labels[1] is None)
        and (labels[0] is None or np.array_equal(*labels))
        and (one.bad, one.counts, one.end, one.end_line) == (other.bad, other.counts, other.end, other.end_line)
    )


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(0, 65535), max_size=6), max_size=6),
    labels=st.booleans(),
    vocab_size=st.sampled_from([1 << 16, 200_000]),
    bad=st.integers(0, 2),
    classes=st.booleans(),
    torn=st.floats(0, 1, exclude_max=True),
)
def test_there_and_back_or_torn(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[int]], labels: bool, vocab_size: int,
    bad: int, classes: bool, torn: float,
) -> None:  # fmt: skip
    path = tmp_path_factory.mktemp("cache") / "block-00000-0000000"
    encoded = encoded_of(rows, labels, bad, classes=classes)
    block = write(path, encoded, vocab_size)
    found = read(path)
    assert found is not None
    assert same(found[0], encoded)
    assert found[1] == block
    kind = np.uint16 if block.width == 2 else np.int32
    count = len(encoded.documents.ids)
    assert np.fromfile(path, kind, count, offset=block.ids).tolist() == encoded.documents.ids.tolist()
    if block.labels is not None:
        bits = np.unpackbits(np.fromfile(path, np.uint8, -(-count // 8), offset=block.labels), count=count)
        assert encoded.documents.labels is not None
        assert bits.tolist() == (encoded.documents.labels != -100).tolist()
    data = path.read_bytes()
    at = int(torn * len(data))
    path.write_bytes(data[:at])
    short = read(path)  # white space at the end may be missing
    assert short is None or same(short[0], encoded)
    if encoded.documents.ids.any():
        path.write_bytes(data[: block.ids] + b"\0" * (len(data) - block.ids))  # pages that never reached the disk
        assert read(path) is None


def test_a_chunk_is_loaded_once_and_only_from_an_earlier_run(tmp_path: Path) -> None:
    encoded = encoded_of([[1, 2]], False)
    first = ChunkCache(tmp_path, vocab_size=10, sinks=["main"])
    assert first.load((0, 0)) is None
    first.save((0, 0), encoded)
    assert first.load((0, 0)) is None
    second = ChunkCache(tmp_path, vocab_size=10, sinks=["main"])
    found = second.load((0, 0))
    assert found is not None
    assert same(found[0], encoded)
    assert second.load((0, 0)) is None
    assert [path.name for path in tmp_path.iterdir()] == ["block-00000-0000000"]


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    said=st.lists(
        st.tuples(st.sampled_from(["main", "eval"]), st.tuples(st.integers(0, 2), st.integers(0, 3))), max_size=6
    )
)
def test_what_some_sink_needs_stays(
    tmp_path_factory: pytest.TempPathFactory, said: list[tuple[str, tuple[int, int]]]
) -> None:
    cache = ChunkCache(tmp_path_factory.mktemp("cache"), vocab_size=10, sinks=["main", "eval"])
    places = [(source, chunk) for source in range(3) for chunk in range(4)]
    for place in places:
        cache.save(place, encoded_of([[1]], False))
    needed = {"main": (0, 0), "eval": (0, 0)}
    lowest = (0, 0)
    for sink, place in said:
        cache.needed_from(sink, place)
        needed[sink] = place
        lowest = max(lowest, min(needed.values()))
    assert sorted(path.name for path in cache.folder.iterdir()) == [
        cache.path(place).name for place in places if place >= lowest
    ]


@pytest.mark.parametrize("classes", [False, True])
def test_where_pairs_are_cut(tmp_path: Path, classes: bool) -> None:
    """Comes back with them, beside control classes too; taken, cut and sliced like the pairs."""
    encoded = encoded_of([[1, 2, 3], [4, 5], [6, 7, 8, 9]], True, classes=classes)
    cuts = np.array([2, 1, 3], np.int64)
    paired = dataclasses.replace(encoded, documents=dataclasses.replace(encoded.documents, cuts=cuts))
    write(tmp_path / "block", paired, 200_000)
    found = read(tmp_path / "block")
    assert found is not None
    read_back, _ = found
    assert same(read_back, encoded)
    assert read_back.documents.cuts is not None
    assert read_back.documents.cuts.tolist() == [2, 1, 3]
    taken, cut = read_back.documents.take(np.array([2, 0])), read_back.documents.slice(1, 3)
    assert taken.cuts is not None
    assert taken.cuts.tolist() == [3, 2]
    assert cut.cuts is not None
    assert cut.cuts.tolist() == [1, 3]


@pytest.mark.parametrize("size", [0, 100, 10_000])
def test_a_chunk_that_a_disk_does_not_take_is_named(tmp_path: Path, size: int) -> None:
    path = tmp_path / "block-00000-0000000"
    with pytest.raises(OSError, match="too large") as caught, files_of_at_most(size):
        write(path, encoded_of([[5] * 20_000], True), 1 << 16)
    assert caught.value.filename == str(path)
    assert not path.exists()
