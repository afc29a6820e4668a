"""Exact global shuffle on a Spark cluster: `jllm shuffle` for those who outgrow one machine.

    spark-submit spark_jobs/shuffle.py -d hdfs:///ids -o hdfs:///ids-sf -n 256

The permutation is the local command's, a function of the data's fingerprint and the seed: output file k holds the rows
of local block k in the same order. A job that was killed is finished by the same line, with the same bytes.

Cost: the driver makes the permutation, 4 bytes a row, and sends it in slices; a Python worker holds one at a time. The
input is read twice, once for its checksums.
"""

import dataclasses
import os
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from jllm.data.dataset import foreign
from jllm.data.dataset.columns import COLUMNS, CU_SEQLENS, INPUT_IDS, Column, conform, schema
from jllm.data.dataset.further import FurtherColumns
from jllm.data.dataset.manifest import (
    CHANGED,
    MANIFEST_NAME,
    MISSING,
    OTHER_CONTENT,
    DataSet,
    Manifest,
    not_described,
    restore,
)
from jllm.data.shuffle.config import check_order
from jllm.data.shuffle.data_set import not_empty, refuse_other_plan, refuse_other_result, refuse_place
from jllm.data.shuffle.folder import blocks_of
from jllm.data.shuffle.layout import block_edges, destinations
from jllm.data.spark.dealing import keys_of_partitions
from jllm.data.spark.failures import as_mistakes
from jllm.data.spark.files import HadoopFiles, bare, is_local, joined, local_path
from jllm.data.spark.place import JobPlace
from jllm.data.spark.session import divide_streams, driver_of, job_session, set_up
from jllm.data.spark.shards import (
    checksums,
    describe_output,
    escaped,
    quoted,
    relative_path,
    schema_of,
    write_shards,
)
from jllm.data.spark.worker_errors import WorkerErrors
from jllm.errors import UserError, say
from jllm.options import command, option

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

POSITION, BLOCK, FILE, ROW, OURS = (f"_jllm_{name}" for name in ("position", "block", "file", "row", "ours"))
"""Columns of the job's own, beside those of the data."""
COMMAND, WORK_NAME = "spark_jobs/shuffle", ".shuffle"
SLICES, LEAST_SLICE = 64, 1 << 16
"""The permutation travels in so many pieces, of so many rows at least."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparkShuffleConfig:
    """Options of the job."""

    data: str = option(dataclasses.MISSING, "-d", help="data set with a manifest, on any file system of Spark")
    output: str = option(dataclasses.MISSING, "-o", help="output folder")
    num_block: int | None = option(None, "-n", help="files to deal the rows to  [default: as many as there are]")
    seed: int = option(1234, help="seed of the permutation")
    clean: bool = option(False, "-C", help="start over: remove what an earlier run left in the output folder")
    verbose: bool = option(False, help="show the logs of Spark, and Python's warnings")

    def __post_init__(self) -> None:
        check_order(self.num_block, self.seed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placing:
    """What the executors need to give every row its position."""

    slices: tuple[Any, ...]
    slice_rows: int
    edges: tuple[int, ...]
    first_rows: dict[str, int]
    root: str
    columns: tuple[str, ...]
    further: tuple[Column, ...]
    keys: tuple[int, ...]
    errors: WorkerErrors

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Rows as Spark read them to rows of the contract with their position and the key of their block."""
        with self.errors.carried():
            yield from self._placed(batches)

    def _placed(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        positions = Positions(self.slices, self.slice_rows)
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
            to = positions.of(row)
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


class Positions:
    """The positions of rows, out of slices of the permutation, of which one at a time is in memory.

    Args:
        slices: broadcasts of them.
        size: rows in each.
    """

    def __init__(self, slices: tuple[Any, ...], size: int) -> None:
        self._slices, self._size = slices, size
        self._number, self._held = -1, np.zeros(0, np.uint32)

    def of(self, rows: Any) -> Any:
        """[rows] where the rows of these numbers go."""
        found = np.empty(len(rows), np.int64)
        of_row = rows // self._size
        for number in np.unique(of_row).tolist():
            if number != self._number:
                self._number, self._held = number, self._slices[number].value
                # The broadcast would keep it as long as the worker lives.
                vars(self._slices[number]).pop("_value", None)
            found[of_row == number] = self._held[rows[of_row == number] - number * self._size]
        return found


def _further_columns(manifest: Manifest, found: list[str]) -> FurtherColumns:
    """What the manifest says of further columns; one that it does not name was not looked at, and is left out."""
    unknown = set(found) - {*COLUMNS, *manifest.further.types, *manifest.further.left_out}
    reason = "the manifest does not name it; make it again with: jllm manifest FOLDER"
    left_out = {**manifest.further.left_out, **dict.fromkeys(sorted(unknown), reason)}
    return FurtherColumns(carried=manifest.further.carried, left_out=left_out)


class SparkShuffle:
    """One run of the job.

    Args:
        spark: the session.
        config: the options.
    """

    def __init__(self, spark: "SparkSession", config: SparkShuffleConfig) -> None:
        set_up(spark)
        self.spark = spark
        self.config = config
        self.files = HadoopFiles(spark)
        self.root = self.files.qualified(config.data)
        self.place = JobPlace(self.files, config.output, work=WORK_NAME, command=COMMAND)
        refuse_place(config.output, self._whole(self.place.folder), self._whole(self.root))
        self.manifest = self._manifest_of_input()
        self.data_set = DataSet(folder=Path(bare(self.root)), manifest=self.manifest)
        self.blocks = blocks_of(self.data_set, config.num_block)
        self.plan = {"fingerprint": self.manifest.fingerprint, "seed": config.seed, "blocks": self.blocks}

    def _whole(self, place: str) -> PurePosixPath:
        return PurePosixPath(os.path.realpath(local_path(place)) if is_local(place) else place)

    def _manifest_of_input(self) -> Manifest:
        place = JobPlace(self.files, self.config.data, work=WORK_NAME, command=COMMAND)
        status = self.files.status(self.root)
        if status is None or not status.is_folder:
            raise UserError(f"-d {self.config.data}: no such folder; give the folder of a data set")
        manifest = place.manifest()
        if manifest is None:
            raise UserError(
                f"-d {self.config.data}: has no {MANIFEST_NAME}; make one with: jllm manifest {self.config.data}"
            )
        added = {relative_path_of(one, self.root) for one in place.shards()} - {each.path for each in manifest.files}
        if added:
            raise not_described(self.config.data, min(added))
        return manifest

    def result(self) -> tuple[Manifest, bool]:
        """The manifest, and whether it is that of an earlier run."""
        with self.place.held(driver_of(self.spark)):
            is_ours = self.config.clean and self.place.clean()
            done = self.place.manifest()
            if done is not None:
                refuse_other_result(self.place.shown, done, self.plan, COMMAND)
                changed = self.place.changed(done)
                if changed is not None:
                    raise restore(f"{self.place.shown}/{changed}{CHANGED}")
                return done, True
            earlier = self.place.begun()
            if earlier is not None:
                refuse_other_plan(self.place.shown, earlier, self.plan)
                pending = self.place.pending()
                if pending is not None:
                    self.place.move(pending)
                    return pending, False
            elif self.place.pending() is not None:  # of an earlier --clean that was killed
                is_ours = self.place.clean()
            is_ours = is_ours or earlier is not None
            if self.place.shards() or not (is_ours or self.place.is_empty()):
                raise not_empty(self.place.shown)
            return self._made(), False

    def _made(self) -> Manifest:
        config, manifest = self.config, self.manifest
        staged = self.place.begin(self.plan)
        self._check_input()
        with as_mistakes(f"-d {config.data}", f"-o {config.output}"):
            frame = self.spark.read.option("mergeSchema", "true").parquet(
                *(escaped(joined(self.root, entry.path)) for entry in manifest.files)
            )
        columns = tuple(name for name in COLUMNS if name in frame.columns)
        if INPUT_IDS not in columns:
            raise UserError(f"-d {config.data}: no column {INPUT_IDS} (columns: {', '.join(frame.columns[:8])})")
        further = _further_columns(manifest, frame.columns)
        for line in further.warnings():
            say(f"warning: {config.data}: {line}")
        errors = WorkerErrors((UserError,))
        with as_mistakes(f"-d {config.data}", f"-o {config.output}"), errors.raised():
            self._write(frame, columns, further, staged, errors)
            self.place.settle(staged)
            entries = describe_output(self.spark, staged)
        written = sum(entry.rows for entry in entries)
        assert written == manifest.rows, f"{written} rows written of {manifest.rows}"
        result = Manifest(
            command=COMMAND,
            options={"seed": config.seed, "blocks": self.blocks},
            files=entries,
            tokenizer=manifest.tokenizer,
            sources=({"name": self.data_set.folder.name, "fingerprint": manifest.fingerprint},),
            further=further,
            labels_checked=True,
            chat_template=manifest.chat_template,
            kind=manifest.kind,
            reference=manifest.reference,
        )
        return self.place.finish(staged, result, "zstd")

    def _check_input(self) -> None:
        """Raises:
        UserError: a file is not what the manifest says.
        """
        paths = {entry.path: joined(self.root, entry.path) for entry in self.manifest.files}
        for entry in self.manifest.files:
            if not self.files.exists(paths[entry.path]):
                raise restore(f"{self.config.data}/{entry.path}{MISSING}")
        with as_mistakes(f"-d {self.config.data}", f"-o {self.config.output}"):
            found = checksums(self.spark, paths.values()) if paths else {}
        for entry in self.manifest.files:
            if entry.sha256 is not None and found[bare(paths[entry.path])] != entry.sha256:
                raise restore(f"{self.config.data}/{entry.path}{OTHER_CONTENT}")

    def _write(
        self, frame: "DataFrame", columns: tuple[str, ...], further: FurtherColumns, staged: str, errors: WorkerErrors
    ) -> None:
        from pyspark.sql.functions import col, lit

        manifest, total = self.manifest, self.manifest.rows
        first_rows, before = {}, 0
        for entry in manifest.files:
            first_rows[entry.path] = before
            before += entry.rows
        positions = destinations(total, fingerprint=manifest.fingerprint, seed=self.config.seed)
        size = max(LEAST_SLICE, -(-total // SLICES))
        broadcast = self.spark.sparkContext.broadcast
        slices = tuple(broadcast(positions[begin : begin + size].copy()) for begin in range(0, max(1, total), size))
        placing = Placing(
            slices=slices,
            slice_rows=size,
            edges=tuple(block_edges(total, self.blocks)[:-1]),
            first_rows=first_rows,
            root=self.root,
            columns=columns,
            further=further.carried,
            keys=keys_of_partitions(self.spark, self.blocks),
            errors=errors,
        )
        read = frame.select(
            *columns,
            *(col(quoted(each.name)) for each in further.carried),
            col("_metadata.file_path").alias(FILE),
            col("_metadata.row_index").alias(ROW),
            lit(manifest.command != "manifest").alias(OURS),
        )
        placed = read.mapInArrow(placing, f"{schema_of(columns, further.carried)}, {POSITION} long, {BLOCK} int")
        shuffled = placed.repartition(self.blocks, BLOCK).sortWithinPartitions(POSITION).drop(POSITION, BLOCK)
        try:
            write_shards(shuffled, staged, further=further.carried)
        finally:
            for each in slices:
                each.destroy()


def relative_path_of(path: str, root: str) -> str:
    """The path of a file below a folder, both full."""
    return bare(path).removeprefix(bare(root).rstrip("/")).lstrip("/")


def run(spark: "SparkSession", config: SparkShuffleConfig) -> Manifest:
    """Shuffle a data set and write the manifest of the result.

    Raises:
        UserError: the data set has no manifest or no token ids, was changed, or the output holds something else.
    """
    return SparkShuffle(spark, config).result()[0]


@command(SparkShuffleConfig, name="shuffle")
def main(config: SparkShuffleConfig) -> None:
    """Shuffle a data set by rows, exactly and globally, on a Spark cluster."""
    with job_session("jllm shuffle", verbose=config.verbose) as spark:
        result, earlier = SparkShuffle(spark, config).result()
    already = ": already shuffled" if earlier else ""
    tokens = result.total("tokens") or 0
    say(f"{config.output}: {result.rows:,} rows, {tokens:,} tokens in {len(result.files)} files{already}")


if __name__ == "__main__":
    divide_streams()
    main()
