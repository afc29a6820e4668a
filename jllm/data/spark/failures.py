"""What Spark raises where a person can put it right, as one line.

Files that cannot be read or written, formats that Spark does not know, executors that are lost. An exception of our own
Python code is none of these: it is a defect, and keeps its traceback.
"""

import contextlib
import re
from collections.abc import Iterator
from urllib.parse import unquote

from jllm.data.spark.files import reason_of
from jllm.data.spark.worker_errors import causes_of, texts_of
from jllm.errors import UserError

_FILE = re.compile(r"(?:while reading file|file:|path:?) *'?((?:[a-z0-9]+:)?/\S+?)['.,:;]*(?:\s|$)")
_DEFECT = "org.apache.spark.api.python.PythonException"
_READING = ("FAILED_READ_FILE", "CANNOT_READ", "is not a Parquet file", "PATH_NOT_FOUND", "ParquetDecodingException")
_FULL = ("No space left", "File too large", "Disk quota exceeded")


@contextlib.contextmanager
def as_mistakes(reading: str, writing: str) -> Iterator[None]:
    """Around calls of Spark.

    Args:
        reading: the option and the input, for people.
        writing: the option and the output.

    Raises:
        UserError: see the module.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        mistake = mistake_of(error, reading, writing)
        if mistake is None:
            raise
        raise mistake from None


def mistake_of(error: BaseException, reading: str, writing: str) -> UserError | None:
    """The mistake behind an exception of Spark's; None where it is a defect."""
    if not type(error).__module__.startswith(("pyspark", "py4j")):
        return None
    java = list(causes_of(error))
    said = "\n".join(texts_of(error))
    names = [str(each.getClass().getName()) for each in java]
    if _DEFECT in names or "PythonException" in type(error).__name__:
        return None
    if any(mark in said for mark in ("DATA_SOURCE_NOT_FOUND", "Failed to find the data source")):
        return UserError("--read_format: Spark knows no format of this name; give parquet, orc, csv, ...")
    reason = reason_of(java[-1]) if java else said.splitlines()[0]
    if any(mark in said for mark in _FULL):
        return UserError(f"{writing}: the disk is full ({reason}); free some space and run the same command again")
    if "CANNOT_MERGE_SCHEMAS" in said:
        return UserError(f"{reading}: its files have a column in several types, which Spark does not read together")
    if any(mark in said for mark in _READING):
        found = _FILE.search(said)
        place = f"{reading.split(' ')[0]} {unquote(found[1]).removeprefix('file:')}" if found else reading
        return UserError(f"{place}: cannot be read: {reason}")
    if any(name.startswith(("java.io.", "java.nio.file.", "org.apache.hadoop.")) for name in names):
        return UserError(f"{writing}: the job failed: {reason}; put that right and run the same command again")
    if "Job aborted" in said or "cancelled" in said or "SparkContext was shut down" in said:
        return UserError(f"{writing}: Spark ended the job: {_first(said)}; run the same command again")
    if "AnalysisException" in type(error).__name__:
        return UserError(f"{reading}: Spark cannot read that: {_first(said)}")
    return None


def _first(said: str) -> str:
    return said.splitlines()[0][:300]
