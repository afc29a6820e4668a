"""Files of columns of every type are read by other programs as what was written, and their bytes depend on it alone."""

import hashlib
import io
from pathlib import Path

import duckdb
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jllm.data.dataset import list_codec
from jllm.data.dataset.columns import Column, ordered
from jllm.data.dataset.file_writer import ColumnFileWriter
from jllm.data.dataset.files import CODECS
from tests.data.sets import rows_of
from tests.data.typed_sets import COLUMNS_OF_ANY_TYPE, EVERY_TYPE, exact_rows, typed_rows

IDS = ("input_ids",)


def written(groups: list[pa.RecordBatch], further: list[Column] | tuple[Column, ...], codec: str = "zstd") -> bytes:
    file = io.BytesIO()
    writer = ColumnFileWriter(file, ordered(IDS, further), codec=codec, metadata={"a": "b"}, writer="test version 0")
    for rows in groups:
        writer.write(rows)
    writer.close()
    return file.getvalue()


@pytest.mark.parametrize("page", [4, 64, 1 << 20], ids=["a row a page", "small pages", "usual pages"])
@settings(deadline=None, max_examples=40)
@given(further=COLUMNS_OF_ANY_TYPE, sizes=st.lists(st.integers(1, 40), min_size=1, max_size=3))
def test_pyarrow_reads_every_type(page: int, further: list[Column], sizes: list[int]) -> None:
    groups = [typed_rows(number, size, further, columns=IDS) for number, size in enumerate(sizes)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(list_codec, "PAGE_BYTES", page)
        data = written(groups, further)
    file = pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True)
    assert file.schema_arrow.equals(groups[0].schema), "types, names and that nothing is null"
    found = [file.read_row_group(index).combine_chunks().to_batches()[0] for index in range(len(groups))]
    assert [batch.num_rows for batch in found] == sizes
    assert exact_rows(found) == exact_rows(groups)


@pytest.mark.parametrize("codec", CODECS)
def test_other_readers(tmp_path: Path, codec: str) -> None:
    further = [each for each in EVERY_TYPE if each.element != "float32"]
    rows = typed_rows(0, 300, further, columns=IDS)
    path = tmp_path / "a.parquet"
    path.write_bytes(written([rows, rows], further, codec))
    wanted = rows.to_pylist() * 2
    assert polars.read_parquet(path).to_dicts() == wanted
    names = ", ".join(f'"{name}"' for name in rows.schema.names)
    found = duckdb.sql(f"select {names} from '{path}'").fetchall()
    assert found == [tuple(row.values()) for row in wanted]


def test_floats_in_other_readers(tmp_path: Path) -> None:
    further = [each for each in EVERY_TYPE if each.element == "float32"]
    rows = typed_rows(0, 300, further, columns=IDS)
    path = tmp_path / "a.parquet"
    path.write_bytes(written([rows], further))
    assert exact_rows(polars.read_parquet(path).to_arrow().cast(rows.schema).to_batches()) == exact_rows([rows])


def test_footer() -> None:
    rows = typed_rows(0, 50, EVERY_TYPE, columns=IDS)
    footer = pq.read_metadata(io.BytesIO(written([rows], EVERY_TYPE)))
    group = footer.row_group(0)
    chunks = {group.column(index).path_in_schema.split(".")[0]: group.column(index) for index in range(7)}
    assert not any(chunk.has_dictionary_page for chunk in chunks.values())
    assert all(chunk.statistics.null_count == 0 for chunk in chunks.values())
    numbers = rows.column("int32").to_pylist()
    assert (chunks["int32"].statistics.min, chunks["int32"].statistics.max) == (min(numbers), max(numbers))
    for name in ("float32", "float32 list", "text", "text list"):
        assert not chunks[name].statistics.has_min_max, "a NaN has no place in a range"
    assert footer.metadata[b"a"] == b"b"


def test_the_bytes_of_files_of_ids_are_what_they_have_always_been() -> None:
    """Data sets and fingerprints that exist must be made again to the byte."""
    rows = rows_of(0, 500, longest=40, columns=IDS)
    found = hashlib.sha256(written([rows, rows.slice(3, 7)], (), "snappy")).hexdigest()
    assert found == "ea2b19b797d4d17d45d770914e757d06dad5d051138b9dca47762cc77d64fe23"
