"""The files of a data set: their names, where they are, how our own are marked, what tells one from another."""

import hashlib
from pathlib import Path

from jllm import atomic
from jllm.errors import UserError

ROW_GROUP_TOKENS = 1 << 20
CONTRACT_KEY, CONTRACT_VERSION = "jllm.format", "1"
"""Written into the footer of our own shards, whose rows need no second look."""
CREATED_BY = "jllm version "
"""What the footer of a file begins its writer's name with when `ColumnFileWriter` wrote it."""
SPARK_SCHEMA_KEY = b"org.apache.spark.sql.parquet.row.metadata"
"""Where Spark keeps its schema, which carries our mark when our own jobs wrote the file."""
MAGIC = b"PAR1"
"""A Parquet file begins and ends with it."""
FOOTER_TAIL = 8  # the footer's length (4 bytes, little-endian) and the magic
CODECS = ("zstd", "gzip", "snappy", "lz4", "brotli")


def file_name(split: str, index: int, codec: str) -> str:
    """`<split>-00000.zstd.parquet`: the name of a split's file `index`."""
    return f"{split}-{index:05d}.{codec}.parquet"


def list_shards(folder: Path) -> list[Path]:
    """All Parquet files below `folder`, sorted by path; names starting with `_` or `.` are skipped at every level.

    Raises:
        UserError: a writer is, or was when it died, still at work there (Spark's `_temporary`).
    """
    found: list[Path] = []
    for parent, folders, files in atomic.walk(folder):
        if "_temporary" in folders:
            raise UserError(
                f"{parent} holds _temporary: its writer has not finished or died; run it again, or remove _temporary"
            )
        if "_delta_log" in folders:
            raise UserError(
                f"{parent} is a Delta table, whose folder also holds rows that were deleted; write the table out as"
                " plain Parquet first"
            )
        folders[:] = [name for name in folders if not name.startswith(("_", "."))]
        found.extend(parent / name for name in files if name.endswith(".parquet") and name[0] not in "_.")
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def footer_of(path: Path) -> str:
    """sha256 of a Parquet file's footer, in hex.

    Raises:
        UserError: the file does not begin and end as a Parquet file does.
    """
    with path.open("rb") as file:
        head = file.read(len(MAGIC))
        size = file.seek(0, 2)
        file.seek(max(0, size - FOOTER_TAIL))
        tail = file.read(FOOTER_TAIL)
        if len(tail) < FOOTER_TAIL or tail[4:] != MAGIC or head != MAGIC:
            raise UserError(f"{path}: not a complete Parquet file ({size} bytes)")
        length = int.from_bytes(tail[:4], "little")
        file.seek(max(0, size - FOOTER_TAIL - length))
        return hashlib.sha256(file.read(length)).hexdigest()


def sha256_of(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
