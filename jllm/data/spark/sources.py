"""Which files an input names on the file systems of Spark, and their records as Spark reads them.

Local inputs are looked at as `jllm.data.sources` does; what lies on other file systems is listed through Hadoop, by the
same rules. Lines of JSON and the formats of Spark are cut anywhere: each of their records comes with its file, the
byte where its part of the file begins, and a number that counts within that part. All other files come whole.

Cost: a listing; Spark reads each file once, a whole one in the memory of one task.
"""

import collections
import dataclasses
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jllm.data.dataset.columns import INPUT_IDS
from jllm.data.prepare.config import Raw2IdsConfig
from jllm.data.prepare.outputs import NAMES_OF_OUR_FOLDERS
from jllm.data.prepare.pretokenized import CHAT_COLUMNS
from jllm.data.sources.chunks import read_chunks
from jllm.data.sources.identity import record_of
from jllm.data.sources.inputs import STDIN, Source, found_at_url, refuse_twice, resolve, source_of
from jllm.data.sources.parquet import refuse_columns
from jllm.data.spark.dealing import dealt
from jllm.data.spark.failures import as_mistakes
from jllm.data.spark.files import FileStatus, HadoopFiles, bare, is_local, local_path
from jllm.data.spark.shards import escaped, quoted
from jllm.errors import UserError

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession

FILE, START, NUMBER, VALUE = (f"_jllm_{name}" for name in ("file", "start", "number", "value"))
LINES, WHOLE, ROWS = "lines", "whole files", "rows"
"""How a group of sources is read."""
WAY_OF_IDS = "rows of ids are a data set already: shuffle the folder as it is, or give it to python -m jllm.raw2ids"
MARK_BYTES = 3
"""A file of lines may be a byte order mark alone."""
MOST_BYTES = (1 << 31) - (1 << 20)
_PATTERN = frozenset("*?[]{}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceGroup:
    """Sources that Spark reads in one way.

    Attributes:
        reading: out of `LINES`, `WHOLE`, `ROWS`.
        frame: `FILE` and `NUMBER`, and `START` with lines and rows; beside them `VALUE`, or the columns of rows.
    """

    reading: str
    frame: "DataFrame"

    def with_needed_columns(self, config: Raw2IdsConfig, first: Source) -> "SourceGroup":
        """The same rows with the columns that the options ask for.

        Args:
            first: the first of the sources.

        Raises:
            UserError: they are not there, or hold ids.
        """
        ours = (FILE, START, NUMBER)
        names = [name for name in self.frame.columns if name not in ours]
        wanted = names
        made_of: Sequence[str] = () if config.field_map or config.format != "auto" else CHAT_COLUMNS
        if config.type == "pretrain":
            made_of = wanted = [config.text_field.split(".")[0]]
        if made_of and not set(made_of) & set(names):
            if INPUT_IDS in names:
                raise UserError(f"-i {first.name}: has {INPUT_IDS}; {WAY_OF_IDS}")
            if config.type == "pretrain":
                refuse_columns(first, made_of, names)
        return dataclasses.replace(self, frame=self.frame.select(*(quoted(name) for name in (*ours, *wanted))))


def resolved(files: HadoopFiles, inputs: Sequence[str], kind: str | None) -> list[Source]:
    """The sources that the inputs name; `Source.path` is a local path or a full URI.

    Raises:
        UserError: as `resolve` does; or Spark cannot read one of them.
    """
    if not inputs:
        raise UserError("-i: say what to read")
    sources: list[Source] = []
    for given in inputs:
        if given == STDIN:
            raise UserError("-i -: Spark reads no standard input; save it to a file, and give that")
        if "://" in given and not given.startswith("file:"):
            sources += _listed(files, given, kind)
        else:
            path = local_path(given) if given.startswith("file:") else given
            place = files.qualified(given) if given.isprintable() else "file:"
            sources += (
                resolve([path], kind=kind, passed_over=NAMES_OF_OUR_FOLDERS)
                if is_local(place)
                else _listed(files, place, kind)
            )
    refuse_twice(sources)
    for source in sources:
        _refuse_unreadable(source)
        if source.size == 0:
            _judge_empty(source)
    return sources


def _judge_empty(source: Source) -> None:
    """What the local command says of an empty file, which Spark passes over.

    Raises:
        UserError: it is none of its kind.
    """
    with tempfile.NamedTemporaryFile(prefix="jllm-") as file:
        try:
            collections.deque(read_chunks(dataclasses.replace(source, path=file.name), 0), maxlen=0)
        except UserError as error:
            raise UserError(str(error).replace(file.name, source.path)) from None


def _refuse_unreadable(source: Source) -> None:
    name = source.path.rsplit("/", 1)[-1]
    try:
        source.path.encode()
    except UnicodeEncodeError:
        raise UserError(f"-i {source.path}: its name is no UTF-8, which Spark cannot name; rename it") from None
    if source.once:
        raise UserError(f"-i {source.path}: is no regular file, which Spark does not read; save it to a file")
    if name[:1] in ("_", "."):
        raise UserError(f"-i {source.path}: Spark passes over names that begin with {name[0]}; rename it")
    if reading_of(source) == WHOLE and (source.size or 0) > MOST_BYTES:
        raise UserError(
            f"-i {source.path}: {source.size:,} bytes, and one task reads at most {MOST_BYTES:,} of a file that cannot"
            " be cut anywhere; cut it into smaller ones, or give lines of JSON without compression"
        )


def reading_of(source: Source) -> str:
    """How a source is read."""
    if source.kind in ("parquet", "ids"):
        return ROWS
    return LINES if source.kind == "jsonl" and source.compression is None else WHOLE


def _listed(files: HadoopFiles, given: str, kind: str | None) -> list[Source]:
    """What an input names on a file system that is not this machine's."""
    try:
        place = files.qualified(given)
        if _PATTERN & set(place):
            found = [one for one in files.matching(place) if not one.is_folder]
            root = place.split("*")[0].split("?")[0].split("[")[0].split("{")[0].rpartition("/")[0]
        else:
            status = files.status(place)
            if status is not None and status.is_folder:
                below = {one.path: one for one in files.below(place)}
                names = found_at_url(given, status.path, list(below), kind, NAMES_OF_OUR_FOLDERS)
                found, root = [below[name] for name in sorted(names)], status.path
            else:
                found = [status] if status is not None else []
                root = place.rpartition("/")[0]
    except UserError as error:
        raise UserError(f"-i {given}: cannot be listed: {error}") from None
    if not found:
        raise UserError(f"-i {given}: nothing there; give a file, a folder, or a glob")
    return [_source_at(one, root, kind) for one in found]


def _source_at(found: FileStatus, root: str, kind: str | None) -> Source:
    name = found.path[len(root) :].lstrip("/") if found.path.startswith(root) else found.path.rsplit("/", 1)[-1]
    return source_of(found.path, name, found.size, kind)


def recorded(files: HadoopFiles, source: Source) -> dict[str, Any]:
    """What a job remembers of a source, as `record_of`; elsewhere than on this machine its size and date."""
    record = record_of(source)
    if not source.is_local:
        status = files.status(source.path)
        record["modified"] = None if status is None else status.modified * 1_000_000
    return record


def paths_of(files: HadoopFiles, sources: Sequence[Source]) -> dict[str, int]:
    """The number of each source by its bare path, as Spark names it."""
    return {bare(files.qualified(source.path)): number for number, source in enumerate(sources)}


def groups_of(
    spark: "SparkSession", files: HadoopFiles, sources: Sequence[Source], *, partitions: int | None, shown: str
) -> list[SourceGroup]:
    """The records of all sources.

    Args:
        partitions: of each group; None leaves them as Spark reads them.
        shown: the option and the input, for people.

    Raises:
        UserError: Spark cannot read them.
    """
    from pyspark.sql.functions import col

    found = []
    for reading in (LINES, WHOLE, ROWS):
        paths = [escaped(files.qualified(each.path)) for each in sources if reading_of(each) == reading]
        if not paths:
            continue
        with as_mistakes(shown, shown):
            if reading == LINES:
                frame = spark.read.format("text").option("lineSep", "\n").load(paths)
                frame = numbered(frame.select(*_of_parts(), col("value").cast("binary").alias(VALUE)))
            elif reading == WHOLE:
                frame = spark.read.format("binaryFile").load(paths)
                frame = numbered(frame.select(col("path").alias(FILE), col("content").alias(VALUE)))
            else:
                frame = spark.read.option("mergeSchema", "true").parquet(*paths)
                frame = numbered(frame.select(*_of_parts(), *(col(quoted(name)) for name in frame.columns)))
        found.append(
            SourceGroup(reading=reading, frame=dealt(spark, frame, partitions, NUMBER) if partitions else frame)
        )
    return found


def group_in_format(
    spark: "SparkSession", name: str, inputs: Sequence[str], *, partitions: int | None, shown: str
) -> SourceGroup:
    """The records of one of Spark's own formats."""
    from pyspark.sql.functions import col

    with as_mistakes(shown, shown):
        frame = spark.read.format(name).load(list(inputs))
        columns = [col(quoted(column)) for column in frame.columns]
        frame = numbered(frame.select(*_of_parts(), *columns))
        frame.schema  # noqa: B018 - where it has no files, Spark says so here
    return SourceGroup(reading=ROWS, frame=dealt(spark, frame, partitions, NUMBER) if partitions else frame)


def _of_parts() -> list["Column"]:
    from pyspark.sql.functions import col

    return [col("_metadata.file_path").alias(FILE), col("_metadata.file_block_start").alias(START)]


def numbered(frame: "DataFrame") -> "DataFrame":
    """With a number for each record that counts up within its part of a file, whatever Spark does to it afterwards."""
    from pyspark.sql.functions import monotonically_increasing_id

    return frame.withColumn(NUMBER, monotonically_increasing_id())
