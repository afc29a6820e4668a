"""Folders that others wrote are read as they mean, or refused with the file's name and the reason."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from jllm.commands.manifest import main as manifest_command
from jllm.commands.shuffle_datasets import main as shuffle_datasets
from jllm.data.dataset.manifest import open_data_set, read_manifest
from jllm.data.dataset.shards import CU_SEQLENS, INPUT_IDS, LABELS, LIST_TYPE, ShardReader
from jllm.data.shuffle.data_set import Resources, shuffle_set
from jllm.errors import UserError
from tests.data.sets import make_set, row_numbers, table_of

ROWS = [[1, 2, 3], [4, 5], [], [6, 7, 8, 9]]
KINDS = {
    "nullable int32, as Spark": pa.list_(pa.int32()),
    "nullable int64, as Spark from Python": pa.list_(pa.int64()),
    "large list": pa.large_list(pa.int64()),
    "non-null": LIST_TYPE,
    "uint32": pa.list_(pa.uint32()),
    "uint16": pa.list_(pa.uint16()),
    "int8": pa.list_(pa.int8()),
    "named item": pa.list_(pa.field("item", pa.int32())),
}


def write(path: Path, columns: dict[str, pa.Array], **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return path


def ids(rows: list[list[int]], kind: pa.DataType | None = None) -> pa.Array:
    return pa.array(rows, kind or pa.list_(pa.int32()))


def run(command: object, *args: object) -> Result:
    return CliRunner().invoke(command, [str(arg) for arg in args])  # type: ignore[arg-type]


def read(path: Path) -> pa.Table:
    return pa.Table.from_batches(list(ShardReader(path)))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("codec", ["snappy", "gzip"])
def test_every_kind_of_list(tmp_path: Path, kind: pa.DataType, codec: str) -> None:
    path = write(tmp_path / "a.parquet", {INPUT_IDS: ids(ROWS, kind)}, compression=codec)
    table = read(path)
    assert table.column(INPUT_IDS).to_pylist() == ROWS
    assert table.schema.field(INPUT_IDS).type == LIST_TYPE
    assert not table.schema.field(INPUT_IDS).nullable


@pytest.mark.parametrize(
    "options", [{"use_compliant_nested_type": False}, {"data_page_version": "2.0"}, {"version": "1.0"}]
)
def test_other_writers(tmp_path: Path, options: dict[str, object]) -> None:
    path = write(tmp_path / "a.parquet", {INPUT_IDS: ids(ROWS)}, **options)
    assert read(path).column(INPUT_IDS).to_pylist() == ROWS


def test_fixed_size_lists(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {INPUT_IDS: ids([[1, 2], [3, 4]], pa.list_(pa.int64(), 2))})
    assert read(path).column(INPUT_IDS).to_pylist() == [[1, 2], [3, 4]]


REFUSED = {
    "null row": ({INPUT_IDS: ids([[1], None])}, "1 rows are null"),
    "null element": ({INPUT_IDS: ids([[1, None]])}, "1 elements are null"),
    "too large": ({INPUT_IDS: ids([[1, 2**31]], pa.list_(pa.int64()))}, "2147483648"),
    "text": ({INPUT_IDS: pa.array(["a"])}, "must be a list of integers"),
    "floats": ({INPUT_IDS: ids([[1]], pa.list_(pa.float32()))}, "must be a list of integers"),
    "nothing but nulls": ({INPUT_IDS: pa.array([[None]], pa.list_(pa.null()))}, "must be a list of integers"),
    "no ids": ({"text": pa.array(["a"])}, "no column input_ids"),
    "boundaries beyond the row": ({INPUT_IDS: ids([[1, 2]]), CU_SEQLENS: ids([[0, 3]])}, "beyond its 2 tokens"),
    "boundaries not from 0": ({INPUT_IDS: ids([[1, 2]]), CU_SEQLENS: ids([[1, 2]])}, "start with 0"),
    "boundaries descending": ({INPUT_IDS: ids([[1, 2]]), CU_SEQLENS: ids([[0, 2, 1, 2]])}, "ascend"),
    "no boundaries": ({INPUT_IDS: ids([[1, 2]]), CU_SEQLENS: ids([[]])}, "empty cu_seqlens"),
    "negative ids": ({INPUT_IDS: ids([[1, -2]])}, "negative"),
}


@pytest.mark.parametrize(("columns", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_with_name_and_reason(tmp_path: Path, columns: dict[str, pa.Array], said: str) -> None:
    write(tmp_path / "set/bad.parquet", columns)
    result = run(manifest_command, tmp_path / "set")
    assert result.exit_code == 2
    assert said in result.stderr
    assert "bad.parquet" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "set/_manifest.json").exists()


def test_not_parquet_at_all(tmp_path: Path) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no, not really")
    with pytest.raises(UserError, match=r"bad\.parquet"):
        open_data_set(tmp_path)


def test_shifted_boundaries_become_those_of_the_row(tmp_path: Path) -> None:
    rows = [[1, 2, 3, 4, 5], [6, 7, 8]]
    path = write(tmp_path / "a.parquet", {INPUT_IDS: ids(rows), CU_SEQLENS: ids([[0, 2, 4], [0, 2]])})
    assert read(path).column(CU_SEQLENS).to_pylist() == [[0, 2, 5], [0, 3]]
    only = ShardReader(path).read_group(0, [CU_SEQLENS])
    assert only.to_pydict() == {CU_SEQLENS: [[0, 2, 5], [0, 3]]}


def test_row_coordinates_stay(tmp_path: Path) -> None:
    """Rows with padding, one of which has a single token of it."""
    rows = [[1, 2, 3, 0], [6, 7, 8, 9]]
    path = write(tmp_path / "a.parquet", {INPUT_IDS: ids(rows), CU_SEQLENS: ids([[0, 2, 3], [0, 4]])})
    assert read(path).column(CU_SEQLENS).to_pylist() == [[0, 2, 3], [0, 4]]


def test_our_own_padding_is_never_taken_for_shifted_boundaries(tmp_path: Path) -> None:
    from jllm.data.dataset.shards import ShardWriter, schema, to_list_array

    batch = pa.RecordBatch.from_arrays(
        [
            to_list_array(np.array([1, 2, 0], np.int32), np.array([0, 3])),
            to_list_array(np.array([0, 2], np.int32), np.array([0, 2])),
        ],
        schema=schema([INPUT_IDS, CU_SEQLENS]),
    )
    with ShardWriter(tmp_path / "a.parquet", columns=[INPUT_IDS, CU_SEQLENS]) as writer:
        writer.write(batch)
    assert read(tmp_path / "a.parquet").column(CU_SEQLENS).to_pylist() == [[0, 2]]


def spark_like(folder: Path) -> Path:
    """What Spark leaves: partition folders, markers, checksums, several schemas; and an EasyLLM data_info.json."""
    write(folder / "lang=de/part-00000-a1.c000.snappy.parquet", {INPUT_IDS: ids([[0, 9, 9], [1, 9]])})
    more = {LABELS: ids([[-100, 9, 8, 7]], pa.list_(pa.int64())), "source": pa.array(["web"])}
    rows = ids([[2, 9, 8, 7]], pa.list_(pa.int64()))
    write(folder / "lang=en/part-00000-b2.c000.snappy.parquet", {INPUT_IDS: rows, **more})
    packed = {INPUT_IDS: ids([[3, 4, 5, 6, 7]]), CU_SEQLENS: ids([[0, 2, 4]])}
    write(folder / "lang=en/part-00001-b2.c000.snappy.parquet", packed)
    for name in ("_SUCCESS", "._SUCCESS.crc", "lang=de/.part-00000-a1.c000.snappy.parquet.crc", "data_info.json"):
        (folder / name).write_text("{}")
    write(folder / "_spark_metadata/part-0.parquet", {"x": pa.array([1])})
    return folder


def test_spark_folder(tmp_path: Path) -> None:
    folder = spark_like(tmp_path / "D/set")
    opened = open_data_set(folder)
    assert opened.manifest.rows == 4
    assert opened.manifest.total("tokens") is None
    result = run(manifest_command, folder)
    assert result.exit_code == 0, result.output
    assert "warning" not in result.output
    manifest = read_manifest(folder)
    assert manifest is not None
    assert manifest.total("tokens") == 14
    # [9, 9], [9] of the first file; 9, 8, 7 with labels; 5 tokens of two documents
    assert manifest.total("trained_tokens") == 3 + 3 + 3
    assert open_data_set(folder).manifest == manifest
    assert run(manifest_command, folder, "--verify").exit_code == 0


def test_shuffling_a_spark_folder_keeps_what_rows_mean(tmp_path: Path) -> None:
    spark_like(tmp_path / "D/set")
    result = run(shuffle_datasets, "-d", tmp_path / "D")
    assert result.exit_code == 0, result.output
    rows = {row[INPUT_IDS][0]: row for row in table_of(tmp_path / "D-sf").to_pylist()}
    assert rows == {
        0: {INPUT_IDS: [0, 9, 9], LABELS: [0, 9, 9], CU_SEQLENS: [0, 3]},
        1: {INPUT_IDS: [1, 9], LABELS: [1, 9], CU_SEQLENS: [0, 2]},
        2: {INPUT_IDS: [2, 9, 8, 7], LABELS: [-100, 9, 8, 7], CU_SEQLENS: [0, 4]},
        3: {INPUT_IDS: [3, 4, 5, 6, 7], LABELS: [3, 4, 5, 6, 7], CU_SEQLENS: [0, 2, 5]},
    }


def test_missing_success_is_a_warning(tmp_path: Path) -> None:
    folder = spark_like(tmp_path / "set")
    (folder / "_SUCCESS").unlink()
    result = run(manifest_command, folder)
    assert result.exit_code == 0
    assert "without _SUCCESS" in result.output


@pytest.mark.parametrize("name", ["_temporary", "lang=en/_temporary", "_delta_log"])
def test_unfinished_or_versioned_folders_are_refused(tmp_path: Path, name: str) -> None:
    folder = spark_like(tmp_path / "set")
    (folder / name).mkdir()
    with pytest.raises(UserError, match=r"_temporary|Delta"):
        open_data_set(folder)


def test_large_row_groups_are_read_in_pieces(tmp_path: Path) -> None:
    from jllm.data.dataset.shards import ROW_GROUP_TOKENS

    count = 3000
    rows = np.arange(count * 1000, dtype=np.int32) // 1000
    column = pa.ListArray.from_arrays(np.arange(0, count * 1000 + 1, 1000, dtype=np.int32), rows)
    write(tmp_path / "D/set/a.parquet", {INPUT_IDS: column}, row_group_size=count)
    batches = list(ShardReader(tmp_path / "D/set/a.parquet"))
    assert max(batch.num_rows for batch in batches) <= ROW_GROUP_TOKENS // 1000 + 1
    assert [batch.column(0)[0][0].as_py() for batch in batches[:2]] == [0, batches[0].num_rows]
    source = open_data_set(tmp_path / "D/set")
    shuffle_set(source, tmp_path / "out", blocks=2, seed=0, resources=Resources(cores=2, memory=1 << 30))
    assert sorted(row_numbers(tmp_path / "out")) == list(range(count))


def test_manifest_of_changed_files_is_made_anew(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "set", 10, files=2)
    next(folder.rglob("*-00001.zstd.parquet")).unlink()
    with pytest.raises(UserError, match="listed in the manifest"):
        open_data_set(folder)
    assert run(manifest_command, folder).exit_code == 0
    manifest = open_data_set(folder).manifest
    assert manifest.rows == 5
    assert manifest.tokenizer is not None, "the tokenizer of the old manifest was kept"


def test_verify_finds_a_changed_byte(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "set", 1000)
    path = next(folder.rglob("*.parquet"))
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    result = run(manifest_command, folder, "--verify")
    assert result.exit_code == 2
    assert path.name in result.stderr
