"""What the Spark jobs share: reading and writing small files on any file system that Spark knows, writing shards, and
the manifest of what was written.

Shards are written by Spark's own writer, through its commit protocol, with settings that suit the shard contract:
zstd, no dictionary, small row groups. A mark in the columns' metadata tells readers that the rows need no second look.
"""

import dataclasses
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import pyarrow as pa

from jllm.data.dataset.columns import COLUMNS, FLOAT32, INT32, TEXT, Column, ordered
from jllm.data.dataset.describe import describe_file
from jllm.data.dataset.files import CONTRACT_KEY, CONTRACT_VERSION
from jllm.data.dataset.manifest import MANIFEST_NAME, FileEntry, Manifest
from jllm.errors import UserError

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

WRITER_OPTIONS = {
    "compression": "zstd",
    "parquet.compression.codec.zstd.level": "1",
    "parquet.enable.dictionary": "false",
    "parquet.block.size": str(4 << 20),
}
SPARK_TYPES = {INT32: "int", FLOAT32: "float", TEXT: "string"}
ENTRY_SCHEMA = (
    "path string, rows long, tokens long, trained_tokens long, longest_row long, bytes long,"
    " footer string, sha256 string, largest_id long"
)


def session(name: str) -> "SparkSession":
    """The session that spark-submit configured."""
    from pyspark.sql import SparkSession

    spark = SparkSession.builder.appName(name).getOrCreate()
    spark.conf.set("spark.sql.execution.arrow.maxRecordsPerBatch", "2000")
    return spark


def schema_of(columns: Iterable[str], further: Iterable[Column] = ()) -> str:
    """The Spark schema of shards with these columns of the contract and these further ones."""
    types = ((each, SPARK_TYPES[each.element]) for each in ordered(tuple(columns), tuple(further)))
    return ", ".join(f"{quoted(each.name)} {f'array<{kind}>' if each.is_list else kind}" for each, kind in types)


def quoted(name: str) -> str:
    """The name of a column as Spark takes it whatever characters are in it."""
    return "`" + name.replace("`", "``") + "`"


def write_shards(frame: "DataFrame", output: str, *, overwrite: bool, further: Iterable[Column] = ()) -> None:
    """Write rows of the shard contract, `further` columns among them; Spark refuses an output that exists unless told
    to overwrite it.

    Raises:
        UserError: the output exists.
    """
    from pyspark.errors import AnalysisException
    from pyspark.sql.functions import col

    mark = {CONTRACT_KEY: CONTRACT_VERSION}
    ours = {*COLUMNS, *(each.name for each in further)}
    columns = [(name, col(quoted(name))) for name in frame.columns]
    marked = frame.select(*[one.alias(name, metadata=mark) if name in ours else one for name, one in columns])
    try:
        marked.write.options(**WRITER_OPTIONS).mode("overwrite" if overwrite else "errorifexists").parquet(output)
    except AnalysisException as error:
        if "PATH_ALREADY_EXISTS" in str(error):
            raise UserError(f"-o {output}: exists; give --clean to replace it, or another output") from None
        raise


def describe_output(spark: "SparkSession", output: str) -> tuple[FileEntry, ...]:
    """The manifest's entries of the files that Spark wrote, counted and hashed where the executors are."""
    files = (
        spark.read.format("binaryFile").option("pathGlobFilter", "*.parquet").option("recursiveFileLookup", "true")
    ).load(output)
    root = qualified(spark, output)

    def entries(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for row in batch.to_pylist():
                entry = dataclasses.asdict(_describe_bytes(row["content"], relative_path(row["path"], root)))
                yield pa.RecordBatch.from_pylist([entry])

    rows = files.select("path", "content").mapInArrow(entries, ENTRY_SCHEMA).collect()
    return tuple(sorted((FileEntry(**row.asDict()) for row in rows), key=lambda entry: entry.path))


def _describe_bytes(content: bytes, name: str) -> FileEntry:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, Path(name).name)
        path.write_bytes(content)
        return dataclasses.replace(describe_file(path, Path(folder)).entry, path=name)


def relative_path(uri: str, root: str) -> str:
    """The path of a file below a folder, both as URIs; a scheme and slashes in front are written in several ways."""
    plain, top = (unquote(text).split(":", 1)[-1].lstrip("/") for text in (uri, root))
    return plain.removeprefix(top.rstrip("/")).lstrip("/")


def _hadoop_path(spark: "SparkSession", path: str) -> tuple[Any, Any]:
    """The file system of a path, and the path."""
    jvm: Any = spark.sparkContext._jvm
    hadoop = jvm.org.apache.hadoop.fs.Path(path)
    return hadoop.getFileSystem(spark.sparkContext._jsc.hadoopConfiguration()), hadoop


def remove_if_empty(spark: "SparkSession", folder: str) -> None:
    """Remove the folder that a failed job leaves: Spark takes away what the job wrote, not the folder around it."""
    system, path = _hadoop_path(spark, folder)
    if system.exists(path) and len(system.listStatus(path)) == 0:
        system.delete(path, False)


def qualified(spark: "SparkSession", path: str) -> str:
    """The path as a full URI."""
    system, hadoop = _hadoop_path(spark, path)
    return str(system.makeQualified(hadoop).toString())


def read_manifest_at(spark: "SparkSession", folder: str) -> Manifest:
    """The manifest of a data set on any file system.

    Raises:
        UserError: there is none.
    """
    import json

    from py4j.protocol import Py4JJavaError

    place = f"{folder.rstrip('/')}/{MANIFEST_NAME}"
    system, path = _hadoop_path(spark, place)
    jvm: Any = spark.sparkContext._jvm
    try:
        stream = system.open(path)
    except Py4JJavaError:
        raise UserError(f"-d {folder}: has no {MANIFEST_NAME}; make one with: jllm manifest {folder}") from None
    text = jvm.org.apache.commons.io.IOUtils.toString(stream, "UTF-8")
    stream.close()
    return Manifest.from_json(json.loads(text), Path(place))


def write_manifest_at(spark: "SparkSession", folder: str, manifest: Manifest) -> None:
    """Write a manifest on any file system: under a temporary name, then renamed."""
    import json

    system, final = _hadoop_path(spark, f"{folder.rstrip('/')}/{MANIFEST_NAME}")
    _, temporary = _hadoop_path(spark, f"{folder.rstrip('/')}/.{MANIFEST_NAME}.tmp")
    # The file system's checksum file would outlive the rename and belie the file.
    system.setWriteChecksum(False)
    stream = system.create(temporary, True)
    stream.write(bytearray(json.dumps(manifest.to_json(), indent=1, ensure_ascii=False).encode()))
    stream.close()
    system.rename(temporary, final)
