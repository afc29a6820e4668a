"""Parquet sources: every row once, from any row on, and only the columns that are asked for."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jllm.data.sources import parquet
from jllm.data.sources.inputs import resolve
from jllm.errors import UserError

EXAMPLES = 30 * int(os.environ.get("JLLM_TEST_SIZE", "1"))


@settings(max_examples=EXAMPLES, deadline=None)
@given(count=st.integers(0, 40), group=st.integers(1, 15), size=st.integers(1, 400))
def test_every_row_once_from_any_chunk(
    tmp_path_factory: pytest.TempPathFactory, count: int, group: int, size: int
) -> None:
    path = tmp_path_factory.mktemp("parquet") / "a.parquet"
    pq.write_table(
        pa.table({"text": [f"row {i}" for i in range(count)], "n": range(count)}), path, row_group_size=group
    )
    (source,) = resolve([str(path)])
    found = list(parquet.chunks(source, 7, 0, 0, ["text"], size))
    records = [parquet.parse(chunk.data, chunk.line) for chunk in found]
    assert [value for each in records for value in each.values] == [{"text": f"row {i}"} for i in range(count)]
    assert [line for each in records for line in each.lines] == list(range(1, count + 1))
    assert [chunk.index for chunk in found] == list(range(len(found)))
    for number, chunk in enumerate(found):
        again = list(parquet.chunks(source, 7, chunk.end, number + 1, ["text"], size))
        assert again == found[number + 1 :]


def test_mistakes_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"no Parquet")
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "b.parquet")
    for name, said in (("a", "cannot be read as Parquet"), ("b", r"no column text or other \(columns: body\)")):
        (source,) = resolve([str(tmp_path / f"{name}.parquet")])
        with pytest.raises(UserError, match=rf"{name}\.parquet: {said}"):
            list(parquet.chunks(source, 0, 0, 0, ["text", "other"], 100))


objects = st.dictionaries(st.sampled_from("abcd"), st.integers(-9, 9) | st.none(), max_size=4)


@settings(max_examples=EXAMPLES, deadline=None)
@given(rows=st.lists(st.fixed_dictionaries({"calls": st.lists(st.fixed_dictionaries({"arguments": objects}))})))
def test_structs_lose_the_nulls_that_arrow_added(rows: list[dict[str, list[dict[str, dict[str, int | None]]]]]) -> None:
    """At any depth; lists keep theirs, and so do columns."""
    extra: dict[str, object] = {
        "calls": [{"arguments": {"a": 1, "z": {"deep": {"x": 1}, "list": [None, 1]}}}],
        "n": None,
    }
    found = parquet.parse(pa.Table.from_pylist([extra, *rows, {"calls": None, "n": 1}]), 1).values

    def naive(value: object) -> object:
        if isinstance(value, dict):
            return {key: naive(item) for key, item in value.items() if item is not None}
        return list(map(naive, value)) if isinstance(value, list) else value

    assert found[0] == extra
    assert found[1:-1] == [{"calls": naive(row["calls"]), "n": None} for row in rows]
    assert found[-1] == {"calls": None, "n": 1}


def test_maps_are_objects() -> None:
    kind = pa.map_(pa.string(), pa.string())
    table = pa.table({"arguments": pa.array([{"a": "1"}, {}], type=kind)})
    assert parquet.parse(table, 1).values == [{"arguments": {"a": "1"}}, {"arguments": {}}]
