"""Documents to files: compression, splits, and where a killed run goes on."""

import contextlib
import itertools
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jllm.data.dataset.manifest import open_data_set
from jllm.data.packing.packers import Packer, StackPacker, WindowPacker
from jllm.data.prepare.config import CODECS
from jllm.data.prepare.saving.chunk_cache import ChunkCache
from jllm.data.prepare.saving.sink import ResumePoint, Sink, SinkPlan
from tests.data.blocks import Inline
from tests.data.packed_rows import documents_of
from tests.data.raw2ids_runs import documents, raw2ids, reference_stream, rows_of, tree, write_jsonl


@pytest.mark.parametrize("codec", CODECS)
def test_every_codec_is_in_the_files(tmp_path: Path, byte_tokenizer: Path, codec: str) -> None:
    texts = documents(30)
    source = write_jsonl(tmp_path / "some.jsonl", texts)
    raw2ids("-i", source, "-o", tmp_path / "out", "--tokenizer", byte_tokenizer, "-t", "pretrain", "-c", codec)
    (path,) = open_data_set(tmp_path / "out").paths
    assert path.name == f"some-00000-00000.{codec}.parquet"
    metadata = pq.ParquetFile(path).metadata
    found = {metadata.row_group(0).column(index).compression for index in range(metadata.num_columns)}
    assert found == {codec.upper()}
    assert rows_of(tmp_path / "out") == reference_stream(byte_tokenizer, texts)


EXAMPLES = 15 * int(os.environ.get("JLLM_TEST_SIZE", "1"))


class StopError(Exception):
    pass


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    chunks=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=9), min_size=1, max_size=6),
    per_split=st.integers(1, 12),
    per_file=st.integers(1, 6),
    stack=st.booleans(),
    stops=st.lists(st.integers(0, 6), max_size=3),
)
def test_files_do_not_show_where_a_run_was_stopped(
    tmp_path_factory: pytest.TempPathFactory, chunks: list[list[int]], per_split: int, per_file: int, stack: bool,
    stops: list[int],
) -> None:  # fmt: skip
    """Splits and files are cut at documents and rows alone; a run that goes on begins where the state says."""
    folder = tmp_path_factory.mktemp("sink")
    packer: Packer = StackPacker(5) if stack else WindowPacker(5)

    def run(name: str, stop: int | None) -> Sink:
        place = folder / name
        (place / "work").mkdir(parents=True, exist_ok=True)
        plan = SinkPlan(
            folder=place / "out", work=place / "work", name="main", codec="zstd", per_split=per_split,
            per_file=per_file, packer=packer,
        )  # fmt: skip
        cache = ChunkCache(place / "work", vocab_size=10, sinks=["main"])
        inline = Inline(place / "work", packer)
        with Sink(plan, cache) as sink:
            sink.start(inline)
            for number in range(sink.resume.chunk, len(chunks)):
                if number == stop:
                    raise StopError
                point = ResumePoint(chunk=number, start=number)
                inline.feed(sink, point, "a", documents_of(chunks[number]))
            sink.end_split((ResumePoint(source=1), 0))
        return sink

    whole = run("whole", None)
    for stop in stops:
        with contextlib.suppress(StopError):
            run("stopped", stop)
    again = run("stopped", None)
    assert tree(folder / "stopped" / "out") == tree(folder / "whole" / "out")
    assert again.entries == whole.entries
    documents = [list(range(length)) for length in itertools.chain(*chunks)]
    splits = -(-len(documents) // per_split)
    assert {entry.path.split("/")[0] for entry in whole.entries} == {f"a-{number:05d}" for number in range(splits)}
    assert all(entry.rows <= per_file for entry in whole.entries)
    for one, other in itertools.pairwise(whole.entries):  # only the last file of a split is not full
        assert one.rows == per_file or one.path.split("/")[0] != other.path.split("/")[0]


def test_a_resume_point_is_read_as_it_was_written() -> None:
    point = ResumePoint(source=1, chunk=2, start=3, line=4, totals={"counts": {"records": 5}})
    values = point.to_json()
    assert values["block"] == 2  # as in folders of earlier versions
    assert ResumePoint.from_json(values) == point


def test_rows_end_where_they_must(tmp_path: Path) -> None:
    plan = SinkPlan(
        folder=tmp_path / "out", work=tmp_path, name="main", packer=WindowPacker(5), codec="zstd",
        per_split=100, per_file=4, max_rows=6,
    )  # fmt: skip
    inline = Inline(tmp_path, plan.packer)
    with Sink(plan, ChunkCache(tmp_path, vocab_size=10, sinks=["main"])) as sink:
        sink.start(inline)
        inline.feed(sink, ResumePoint(), "a", documents_of([3] * 5))
        assert not sink.full
        inline.feed(sink, ResumePoint(chunk=1), "a", documents_of([3] * 5))
        assert sink.full
        sink.end_split((ResumePoint(source=1), 0))
    assert [entry.rows for entry in sink.entries] == [4, 2]


def test_what_goes_wrong_while_writing_is_raised(tmp_path: Path) -> None:
    (tmp_path / "out").touch()  # where a folder has to be
    plan = SinkPlan(
        folder=tmp_path / "out", work=tmp_path, name="main", packer=WindowPacker(5), codec="zstd",
        per_split=1, per_file=1,
    )  # fmt: skip
    inline = Inline(tmp_path, plan.packer)

    def run() -> None:
        with Sink(plan, ChunkCache(tmp_path, vocab_size=10, sinks=["main"])) as sink:
            sink.start(inline)
            for number in range(20):
                inline.feed(sink, ResumePoint(chunk=number), "a", documents_of([3]))

    with pytest.raises(OSError, match="out"):
        run()
