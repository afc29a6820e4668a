"""Exact global shuffle on a Spark cluster: `jllm shuffle` for those who outgrow one machine.

    spark-submit spark_jobs/shuffle.py -d hdfs:///ids -o hdfs:///ids-sf -n 256

The permutation is the local command's, a function of the data's fingerprint and the seed: output file k holds the rows
of local block k in the same order. Every Python worker maps the permutation from a file in its machine's temporary
folder, made once for each machine: 4 bytes a row.
"""

import dataclasses
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from jllm.data.dataset import foreign
from jllm.data.dataset.columns import COLUMNS, CU_SEQLENS, INPUT_IDS, Column, conform, schema
from jllm.data.dataset.further import FurtherColumns
from jllm.data.dataset.manifest import Manifest
from jllm.data.shuffle.layout import block_edges, destinations
from jllm.data.spark import (
    describe_output,
    qualified,
    quoted,
    read_manifest_at,
    relative_path,
    schema_of,
    session,
    write_manifest_at,
    write_shards,
)
from jllm.errors import UserError
from jllm.options import command, option

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

POSITION, BLOCK, FILE, ROW, OURS = (f"_jllm_{name}" for name in ("position", "block", "file", "row", "ours"))
"""Columns of the job's own, beside those of the data."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparkShuffleConfig:
    """Options of the job."""

    data: str = option(dataclasses.MISSING, "-d", help="data set with a manifest, on any file system of Spark")
    output: str = option(dataclasses.MISSING, "-o", help="output folder")
    num_block: int | None = option(None, "-n", help="files to deal the rows to  [default: as many as there are]")
    seed: int = option(1234, help="seed of the permutation")
    clean: bool = option(False, "-C", help="replace what is in the output folder")

    def __post_init__(self) -> None:
        if self.num_block is not None and self.num_block < 1:
            raise UserError(f"--num_block {self.num_block}: give at least 1")
        if self.seed < 0:
            raise UserError(f"--seed {self.seed}: give 0 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placing:
    """What the executors need to give every row its position."""

    fingerprint: str
    seed: int
    rows: int
    edges: tuple[int, ...]
    first_rows: dict[str, int]
    root: str
    columns: tuple[str, ...]
    further: tuple[Column, ...]
    keys: tuple[int, ...]

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Rows as Spark read them to rows of the contract with their position and the key of their block."""
        positions = mapped_destinations(self.rows, self.fingerprint, self.seed)
        for batch in batches:
            if not batch.num_rows:
                continue
            names = [name for name in COLUMNS if name in batch.schema.names]
            arrays = {name: foreign.list_column(batch.column(name), name) for name in names}
            if CU_SEQLENS in arrays and not batch.column(OURS)[0].as_py():
                arrays[CU_SEQLENS] = foreign.boundaries(arrays[CU_SEQLENS], arrays[INPUT_IDS], "input")
            files = batch.column(FILE).dictionary_encode()
            paths = [relative_path(uri, self.root) for uri in files.dictionary.to_pylist()]
            file, within = files.indices.to_numpy(), batch.column(ROW).to_numpy()
            for each in self.further:
                arrays[each.name] = _further_column(batch.column(each.name), each, paths, file, within)
            read = pa.RecordBatch.from_arrays(list(arrays.values()), schema=schema(names, self.further))
            rows = conform(read, self.columns, self.further)
            row = np.array([self.first_rows[path] for path in paths])[file] + within
            to = np.asarray(positions[row], np.int64)
            block = np.searchsorted(np.array(self.edges), to, side="right") - 1
            yield pa.RecordBatch.from_arrays(
                [*rows.columns, pa.array(to), pa.array(np.array(self.keys, np.int32)[block])],
                names=[*rows.schema.names, POSITION, BLOCK],
            )


def _further_column(array: pa.Array, column: Column, paths: list[str], file: Any, within: Any) -> pa.Array:
    """The rows of a further column, in the contract's type; what cannot be is refused with the row's place.

    Args:
        array: as Spark read them.
        column: what they must become.
        paths: of the files that they are from.
        file: [rows] the number of each row's file in `paths`.
        within: [rows] the number of each row in its file.
    """
    converted = []
    # Rows of one file follow each other, and rarely does a batch have those of two.
    starts = np.flatnonzero(np.diff(file, prepend=-1) | (np.diff(within, prepend=-1) != 1))
    for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(file)], strict=True):
        where = f"{paths[file[start]]}: column {column.name}"
        rows = array.slice(start, end - start)
        converted.append(foreign.further_column(rows, column, where, first_row=int(within[start])))
    return pa.concat_arrays(converted)


def mapped_destinations(rows: int, fingerprint: str, seed: int) -> Any:
    """The permutation, mapped from a file of this machine that the first worker to need it makes."""
    path = Path(tempfile.gettempdir(), f"jllm-{os.getuid()}-{fingerprint[:16]}-{seed}-{rows}.npy")
    if not path.exists():
        descriptor, temporary = tempfile.mkstemp(suffix=".npy", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            np.save(file, destinations(rows, fingerprint=fingerprint, seed=seed))
        os.replace(temporary, path)
    return np.load(path, mmap_mode="r") if rows else np.zeros(0, np.uint32)


def keys_of_blocks(spark: "SparkSession", blocks: int) -> tuple[int, ...]:
    """For every block a number that Spark's hash partitioning sends to the partition of the same number."""
    from pyspark.sql.functions import col, hash, lit, pmod

    found: dict[int, int] = {}
    start = 0
    while len(found) < blocks:
        end = start + 16 * blocks
        numbers = spark.range(start, end, numPartitions=1).select(col("id").cast("int").alias("id"))
        for number, partition in numbers.select("id", pmod(hash("id"), lit(blocks))).collect():
            found.setdefault(partition, number)
        start = end
    return tuple(found[block] for block in range(blocks))


def _read(spark: "SparkSession", data: str, paths: list[str]) -> "DataFrame":
    """The files of a data set as one frame.

    Raises:
        UserError: a column has types in them that Spark cannot bring together.
    """
    from py4j.protocol import Py4JJavaError

    try:
        return spark.read.option("mergeSchema", "true").parquet(*paths)
    except Py4JJavaError as error:
        if "CANNOT_MERGE_SCHEMAS" not in str(error):
            raise
        raise UserError(
            f"-d {data}: its files have a column in several types, which Spark does not read; shuffle it with:"
            " python -m jllm.shuffle_datasets"
        ) from None


def _further_columns(manifest: Manifest, found: list[str]) -> FurtherColumns:
    """What the manifest says of further columns; one that it does not name was not looked at, and is left out."""
    unknown = set(found) - {*COLUMNS, *manifest.further.types, *manifest.further.left_out}
    reason = "the manifest does not name it; make it again with: jllm manifest FOLDER"
    left_out = {**manifest.further.left_out, **dict.fromkeys(sorted(unknown), reason)}
    return FurtherColumns(carried=manifest.further.carried, left_out=left_out)


def run(spark: "SparkSession", config: SparkShuffleConfig) -> Manifest:
    """Shuffle a data set and write the manifest of the result.

    Raises:
        UserError: the data set has no manifest or no token ids, or the output exists.
    """
    from pyspark.sql.functions import col, lit

    manifest = read_manifest_at(spark, config.data)
    blocks = config.num_block or len(manifest.files)
    first_rows, total = {}, 0
    for entry in manifest.files:
        first_rows[entry.path] = total
        total += entry.rows
    paths = [f"{config.data.rstrip('/')}/{entry.path}" for entry in manifest.files]
    frame = _read(spark, config.data, paths)
    columns = tuple(name for name in COLUMNS if name in frame.columns)
    if INPUT_IDS not in columns:
        raise UserError(f"-d {config.data}: no column {INPUT_IDS} (columns: {', '.join(frame.columns[:8])})")
    further = _further_columns(manifest, frame.columns)
    for line in further.warnings():
        print(f"warning: {config.data}: {line}", flush=True)
    placing = Placing(
        fingerprint=manifest.fingerprint,
        seed=config.seed,
        rows=total,
        edges=tuple(block_edges(total, blocks)[:-1]),
        first_rows=first_rows,
        root=qualified(spark, config.data),
        columns=columns,
        further=further.carried,
        keys=keys_of_blocks(spark, blocks),
    )
    ours = manifest.command != "manifest"
    read = frame.select(
        *columns,
        *(col(quoted(each.name)) for each in further.carried),
        col("_metadata.file_path").alias(FILE),
        col("_metadata.row_index").alias(ROW),
        lit(ours).alias(OURS),
    )
    placed = read.mapInArrow(placing, f"{schema_of(columns, further.carried)}, {POSITION} long, {BLOCK} int")
    shuffled = placed.repartition(blocks, BLOCK).sortWithinPartitions(POSITION).drop(POSITION, BLOCK)
    write_shards(shuffled, config.output, overwrite=config.clean, further=further.carried)
    entries = describe_output(spark, config.output)
    written = sum(entry.rows for entry in entries)
    assert written == total, f"{written} rows written of {total}"
    result = Manifest(
        command="spark_jobs/shuffle",
        options={"seed": config.seed, "blocks": blocks},
        files=entries,
        tokenizer=manifest.tokenizer,
        sources=({"name": config.data.rstrip("/").rsplit("/", 1)[-1], "fingerprint": manifest.fingerprint},),
        further=further,
        labels_checked=True,
        chat_template=manifest.chat_template,
    )
    write_manifest_at(spark, config.output, result)
    return result


@command(SparkShuffleConfig, name="shuffle")
def main(config: SparkShuffleConfig) -> None:
    """Shuffle a data set by rows, exactly and globally, on a Spark cluster."""
    spark = session("jllm shuffle")
    result = run(spark, config)
    spark.stop()
    print(f"{config.output}: {result.rows:,} rows, {result.total('tokens'):,} tokens in {len(result.files)} files")


if __name__ == "__main__":
    main()
