"""Spark jobs as people start them, each a driver of its own: started, killed at a moment, awaited."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pyspark

from tests.spark import quick_java

ROOT = Path(__file__).parents[2]
SUBMIT = (
    str(Path(pyspark.__file__).parent / "bin" / "spark-submit"), "--master", "local[2]",
    "--conf", "spark.ui.enabled=false", "--conf", "spark.sql.codegen.wholeStage=false", "--driver-memory", "512m",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Submitted:
    """How a job ended."""

    code: int
    out: str
    err: str


def start(script: str, words: Sequence[str], cwd: Path) -> "subprocess.Popen[str]":
    """Start a job in a process group of its own."""
    environment = {
        **os.environ,
        **quick_java.ENVIRONMENT,
        "PYTHONPATH": str(ROOT),
        "PYSPARK_PYTHON": sys.executable,
        "PYSPARK_DRIVER_PYTHON": sys.executable,
        "SPARK_HOME": str(Path(pyspark.__file__).parent),
        "SPARK_LOCAL_IP": "127.0.0.1",
        "SPARK_LOCAL_DIRS": str(cwd),
    }
    return subprocess.Popen(
        [*SUBMIT, str(ROOT / "spark_jobs" / script), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=environment,
        start_new_session=True,
    )


def wait(job: "subprocess.Popen[str]") -> Submitted:
    out, err = job.communicate(timeout=300)
    return Submitted(job.returncode, out, err)


def kill_when(job: "subprocess.Popen[str]", pattern: str, folder: Path, delay: float) -> bool:
    """Kill a job with all its processes, `delay` seconds after a path of the pattern is below the folder; whether it
    was still at work."""
    until = time.monotonic() + 200
    while job.poll() is None and time.monotonic() < until and not any(folder.glob(pattern)):
        time.sleep(0.003)
    time.sleep(delay)
    alive = job.poll() is None
    if alive:
        os.killpg(job.pid, signal.SIGKILL)
    job.communicate()
    return alive
