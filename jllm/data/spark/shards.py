"""Shards that Spark writes, and what is in them.

Shards are written by Spark's own writer, through its commit protocol, with settings that suit the shard contract:
zstd, no dictionary, small row groups. A mark in the columns' metadata tells readers that the rows need no second look.
"""

import dataclasses
import hashlib
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import pyarrow as pa

from jllm.data.dataset.columns import COLUMNS, FLOAT32, INT32, TEXT, Column, ordered
from jllm.data.dataset.describe import describe_file
from jllm.data.dataset.files import CONTRACT_KEY, CONTRACT_VERSION
from jllm.data.dataset.manifest import FileEntry
from jllm.data.spark.files import bare

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

CODECS_OF_SPARK = {"zstd": "zstd", "gzip": "gzip", "snappy": "snappy", "lz4": "lz4_raw"}
"""`--compress`, and what Spark calls it; what is not here needs a library that Spark does not carry."""
WRITER_OPTIONS = {
    "parquet.compression.codec.zstd.level": "1",
    "parquet.enable.dictionary": "false",
    "parquet.block.size": str(4 << 20),
}
SPARK_TYPES = {INT32: "int", FLOAT32: "float", TEXT: "string"}
ENTRY_SCHEMA = (
    "path string, rows long, tokens long, trained_tokens long, longest_row long, bytes long,"
    " footer string, sha256 string, largest_id long"
)


def schema_of(columns: Iterable[str], further: Iterable[Column] = ()) -> str:
    """The Spark schema of shards with these columns of the contract and these further ones."""
    types = ((each, SPARK_TYPES[each.element]) for each in ordered(tuple(columns), tuple(further)))
    return ", ".join(f"{quoted(each.name)} {f'array<{kind}>' if each.is_list else kind}" for each, kind in types)


def quoted(name: str) -> str:
    """The name of a column as Spark takes it whatever characters are in it."""
    return "`" + name.replace("`", "``") + "`"


def write_shards(frame: "DataFrame", output: str, *, codec: str = "zstd", further: Iterable[Column] = ()) -> None:
    """Write rows of the shard contract, `further` columns among them, to a new folder."""
    from pyspark.sql.functions import col

    mark = {CONTRACT_KEY: CONTRACT_VERSION}
    ours = {*COLUMNS, *(each.name for each in further)}
    columns = [(name, col(quoted(name))) for name in frame.columns]
    marked = frame.select(*[one.alias(name, metadata=mark) if name in ours else one for name, one in columns])
    options = {**WRITER_OPTIONS, "compression": CODECS_OF_SPARK[codec]}
    marked.write.options(**options).mode("errorifexists").parquet(output)


def describe_output(spark: "SparkSession", folder: str) -> tuple[FileEntry, ...]:
    """The manifest's entries of the files that Spark wrote into a folder, counted and hashed where the executors
    are."""
    files = spark.read.format("binaryFile").option("pathGlobFilter", "*.parquet").load(escaped(folder))

    def entries(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for path, content in zip(batch.column(0).to_pylist(), batch.column(1), strict=True):
                entry = _describe_bytes(content.as_buffer(), path.rsplit("/", 1)[-1])
                yield pa.RecordBatch.from_pylist([dataclasses.asdict(entry)])

    rows = files.select("path", "content").mapInArrow(entries, ENTRY_SCHEMA).collect()
    return tuple(sorted((FileEntry(**row.asDict()) for row in rows), key=lambda entry: entry.path))


def checksums(spark: "SparkSession", paths: Iterable[str]) -> dict[str, str]:
    """sha256 of files, by their bare paths, hashed where the executors are."""
    files = spark.read.format("binaryFile").load([escaped(path) for path in paths])

    def hashes(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for path, content in zip(batch.column(0).to_pylist(), batch.column(1), strict=True):
                found = hashlib.sha256(content.as_buffer()).hexdigest()
                yield pa.RecordBatch.from_pylist([{"path": path, "sha256": found}])

    rows = files.select("path", "content").mapInArrow(hashes, "path string, sha256 string").collect()
    return {bare(row.path): row.sha256 for row in rows}


def _describe_bytes(content: Any, name: str) -> FileEntry:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, Path(name).name)
        path.write_bytes(content)
        return dataclasses.replace(describe_file(path, Path(folder)).entry, path=name)


def relative_path(uri: str, root: str) -> str:
    """The path of a file, a URI, below a folder, a full path."""
    return bare(unquote(uri)).removeprefix(bare(root).rstrip("/")).lstrip("/")


def escaped(path: str) -> str:
    """A path as Spark takes it whatever characters are in it: Spark reads patterns."""
    return re.sub(r"([\\{}\[\]*?])", r"\\\1", path)
