"""Folders of Parquet files as other programs write them."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from jllm.data.dataset.columns import CU_SEQLENS, INPUT_IDS, LABELS


def write(path: Path, columns: dict[str, pa.Array], **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return path


def ids(rows: list[list[int]], kind: pa.DataType | None = None) -> pa.Array:
    return pa.array(rows, kind or pa.list_(pa.int32()))


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
