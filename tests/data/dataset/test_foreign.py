"""Folders that others wrote are read as they mean, or refused with the file's name and the reason."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner, Result

from jllm.commands.manifest import main as manifest_command
from jllm.commands.shuffle_datasets import main as shuffle_datasets
from jllm.data.dataset import files
from jllm.data.dataset.columns import Column
from jllm.data.dataset.foreign import further_column
from jllm.data.dataset.manifest import open_data_set
from jllm.data.dataset.shards import CU_SEQLENS, INPUT_IDS, LABELS, LIST_TYPE, ShardReader
from jllm.data.shuffle.data_set import Resources, shuffle_set
from jllm.errors import UserError
from tests.data.foreign_sets import ids, spark_like, write
from tests.data.sets import row_numbers, table_of

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


FURTHER = {
    "int64": (pa.array([1, -(2**31), 2**31 - 1], pa.int64()), [1, -(2**31), 2**31 - 1]),
    "uint8 lists": (pa.array([[1], [], [255]], pa.list_(pa.uint8())), [[1], [], [255]]),
    "doubles": (pa.array([0.1, float("inf"), 1e-60]), [np.float32(0.1), float("inf"), 0.0]),
    "half": (pa.array(np.array([1.5, -0.25, 3], np.float16)), [1.5, -0.25, 3]),
    "large lists of large text": (
        pa.array([["a", "é"], [], ["日"]], pa.large_list(pa.large_string())),
        [["a", "é"], [], ["日"]],
    ),
    "text views": (pa.array(["a" * 20, "", "b"], pa.string_view()), ["a" * 20, "", "b"]),
    "categories": (pa.array(["x", "y", "x"]).dictionary_encode(), ["x", "y", "x"]),
    "lists of categories": (
        pa.array([["x"], ["y", "x"], []], pa.list_(pa.dictionary(pa.int32(), pa.string()))),
        [["x"], ["y", "x"], []],
    ),
    "fixed lists": (pa.array([[1.0, 2.0]] * 3, pa.list_(pa.float32(), 2)), [[1.0, 2.0]] * 3),
}


@pytest.mark.parametrize(("array", "wanted"), FURTHER.values(), ids=FURTHER.keys())
def test_further_columns_of_other_types(tmp_path: Path, array: pa.Array, wanted: list[object]) -> None:
    path = write(tmp_path / "a.parquet", {INPUT_IDS: ids(ROWS[:3]), "x": array})
    (column,) = ShardReader(path).further.carried
    table = read(path)
    assert table.schema.field("x").equals(pa.field("x", column.type, nullable=False))
    assert table.column("x").to_pylist() == wanted
    sliced = further_column(array.slice(1), column, "x")
    assert sliced.to_pylist() == wanted[1:]


WRONG = {
    "null": (pa.array([1, None, 3]), "row 1 is null"),
    "null list": (pa.array([[1], [2], None]), "row 2 is null"),
    "null in a list": (pa.array([[1], [], [2, None]]), "row 2 has a null in its list"),
    "null category": (pa.array(["a", None, None]).dictionary_encode(), "row 1 is null"),
    "too large": (pa.array([1, 2, 2**31], pa.int64()), "rows 0 to 2: Integer value 2147483648"),
    "double too large": (pa.array([[1.0], [2.0, 1e39], []]), "row 1 has 1e+39, which is beyond float32"),
}


@pytest.mark.parametrize(("array", "said"), WRONG.values(), ids=WRONG.keys())
def test_further_values_that_do_not_fit_name_file_row_and_column(tmp_path: Path, array: pa.Array, said: str) -> None:
    write(tmp_path / "D/set/a.parquet", {INPUT_IDS: ids(ROWS[:3]), "x": array})
    result = run(shuffle_datasets, "-d", tmp_path / "D")
    assert result.exit_code == 2
    assert f"a.parquet: row group 0: column x: {said}" in result.stderr
    assert result.stderr.count("\n") == 1


def test_rows_are_named_in_the_batches_of_a_large_row_group_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "ROW_GROUP_TOKENS", 10)
    values = [*range(99), None]
    path = write(tmp_path / "a.parquet", {INPUT_IDS: ids([[1, 2]] * 100), "x": pa.array(values)})
    with pytest.raises(UserError, match=r"a\.parquet: row group 0: column x: row 99 is null"):
        read(path)


def test_text_that_is_not_utf8_is_refused() -> None:
    bad = pa.array([b"good", b"\xff\xfe"]).view(pa.string())
    with pytest.raises(UserError, match=r"here: rows 5 to 6: .*UTF8"):
        further_column(bad, Column(name="x", element="text", is_list=False), "here", first_row=5)


def test_a_null_among_the_values_of_a_dictionary_is_found() -> None:
    column = pa.DictionaryArray.from_arrays(pa.array([0, 1, 0]), pa.array(["a", None]))
    with pytest.raises(UserError, match="x: row 1 is null"):
        further_column(column, Column(name="x", element="text", is_list=False), "x")
    lists = pa.ListArray.from_arrays(pa.array([0, 1, 3], pa.int32()), column)
    with pytest.raises(UserError, match="x: row 1 has a null in its list"):
        further_column(lists, Column(name="x", element="text"), "x")


def test_no_source_is_an_empty_tag() -> None:
    tags = pa.array(["web", None])
    assert further_column(tags, Column(name="source", element="text", is_list=False), "").to_pylist() == ["web", ""]
