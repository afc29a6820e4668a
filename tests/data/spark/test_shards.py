"""What the Spark jobs share and needs no Spark: schemas, and paths below a folder."""

import pytest

from jllm.data.spark.shards import quoted, relative_path, schema_of
from tests.data.typed_sets import EVERY_TYPE


def test_schema() -> None:
    assert schema_of(["labels", "input_ids"]) == "`input_ids` array<int>, `labels` array<int>"
    assert schema_of(["input_ids"], EVERY_TYPE).split(", ")[1:] == [
        *("`float32` float", "`float32 list` array<float>"),
        *("`int32` int", "`int32 list` array<int>"),
        *("`text` string", "`text list` array<string>"),
    ]


def test_names_of_any_characters() -> None:
    assert [quoted(name) for name in ("a.b", "x y", "`q`")] == ["`a.b`", "`x y`", "```q```"]


@pytest.mark.parametrize(
    ("uri", "root"),
    [
        ("file:" + "///data/a%20b/lang=de/0.parquet", "file:/data/a b"),
        ("file:/data/a b/lang=de/0.parquet", "/data/a b/"),
        ("hdfs://host:80/a/lang=de/0.parquet", "hdfs://host:80/a"),
    ],
)
def test_paths_below_a_folder(uri: str, root: str) -> None:
    assert relative_path(uri, root) == "lang=de/0.parquet"
