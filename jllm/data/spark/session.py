"""The session of a job, and what a person sees of it.

Guarantees: the last line is the job's own, a mistake on standard error; Spark's logs and Python's warnings are shown
with `verbose` alone.
"""

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from jllm.children import SAFE_PATH
from jllm.data.spark.claim import DriverProcess
from jllm.errors import say

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

BATCH_ROWS, BATCH_BYTES = 2000, 32 << 20


@contextlib.contextmanager
def job_session(name: str, *, verbose: bool) -> Iterator["SparkSession"]:
    """The session that spark-submit configured, stopped at the end; or the one that is there, which stays."""
    from pyspark import SparkContext
    from pyspark.sql import SparkSession

    if SparkContext._active_spark_context is not None:
        yield SparkSession.builder.getOrCreate()
        return
    builder = SparkSession.builder.appName(name).config(f"spark.executorEnv.{SAFE_PATH}", "1")
    with warnings.catch_warnings():
        if not verbose:
            warnings.simplefilter("ignore")
            _silence_logs()
            builder = builder.config("spark.log.level", "OFF").config("spark.executorEnv.PYTHONWARNINGS", "ignore")
            builder = builder.config("spark.ui.showConsoleProgress", "false")
        spark = builder.getOrCreate()
        try:
            yield spark
        finally:
            spark.stop()


class DriverStandardError(io.TextIOBase):
    """Standard error of the JVM that started this process, which has no other: spark-submit joins both streams of a
    driver in Python to its standard output."""

    def write(self, text: str) -> int:
        from pyspark import SparkContext

        try:
            SparkContext._ensure_initialized()  # type: ignore[attr-defined]  # finds that JVM
            jvm: Any = SparkContext._jvm
            jvm.java.lang.System.err.print(text)
        except Exception:  # it is gone: whoever reads the joined streams gets the line
            say(text, end="", file=sys.__stderr__, flush=True)
        return len(text)


def divide_streams() -> None:
    """Give a process that spark-submit started a standard error."""
    if "PYSPARK_GATEWAY_PORT" in os.environ:
        sys.stderr = DriverStandardError()


def set_up(spark: "SparkSession") -> None:
    """Sizes of what Python is given at a time: rows, and bytes where Spark knows of that."""
    spark.conf.set("spark.sql.execution.arrow.maxRecordsPerBatch", str(BATCH_ROWS))
    spark.conf.set("spark.sql.execution.arrow.maxBytesPerBatch", str(BATCH_BYTES))


def driver_of(spark: "SparkSession") -> DriverProcess:
    """The JVM that works for this process."""
    context = spark.sparkContext
    jvm: Any = context._jvm
    own = getattr(context, "_temp_dir", None)
    folders = () if own is None else (os.path.dirname(own),)
    return DriverProcess(jvm=int(jvm.java.lang.ProcessHandle.current().pid()), scratch=folders)


def _silence_logs() -> None:
    """Before the context begins, whose start alone is pages of them."""
    from pyspark import SparkContext

    SparkContext._ensure_initialized()  # type: ignore[attr-defined]  # starts the JVM, or finds that of spark-submit
    jvm: Any = SparkContext._jvm
    log4j = jvm.org.apache.logging.log4j
    log4j.core.config.Configurator.setRootLevel(log4j.Level.OFF)
