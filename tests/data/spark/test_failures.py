"""What Spark raises is one line where a person can put it right; a defect keeps its traceback."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jllm.data.spark.failures import as_mistakes, mistake_of
from jllm.errors import UserError

pytestmark = pytest.mark.slow


def test_a_damaged_file_is_named(spark: Any, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["some text"] * 99}), tmp_path / "a b.parquet")
    schema = spark.read.parquet(str(tmp_path)).schema
    (tmp_path / "a b.parquet").write_bytes(b"PAR1" + b"x" * 99 + b"PAR1")
    with pytest.raises(UserError, match=r"^-i \S*a b.parquet: cannot be read: ") as found, as_mistakes("-i x", "-o y"):
        spark.read.schema(schema).parquet(str(tmp_path)).collect()
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("name", "said"), [("nosuchformat", "--read_format: Spark knows no format"), ("csv", "-i .*missing")]
)
def test_what_is_not_there(spark: Any, tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(UserError, match=said), as_mistakes("-i x", "-o y"):
        spark.read.format(name).load(str(tmp_path / "missing")).collect()


def test_a_folder_that_is_a_file(spark: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"^-o y: "), as_mistakes("-i x", "-o y"):
        spark.range(3).write.parquet(str(tmp_path / "file" / "out"))


def test_defects_are_left_alone(spark: Any) -> None:
    def defect(batches: Any) -> Any:
        raise ZeroDivisionError("java.io.IOException: no space left")
        yield

    with pytest.raises(Exception, match="ZeroDivisionError") as found, as_mistakes("-i x", "-o y"):
        spark.range(3).mapInArrow(defect, "id long").collect()
    assert not isinstance(found.value, UserError)
    assert mistake_of(ZeroDivisionError("java.io.IOException"), "-i x", "-o y") is None
