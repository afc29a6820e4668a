"""A standalone Spark cluster on loopback ports: a master, workers that can be killed, and spark-submit as the page
shows it."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jllm.parallel.ports import free_port
from tests.pages.session import kill_group
from tests.spark import quick_java

ROOT = Path(__file__).parents[2]
HOST = "127.0.0.1"
SECONDS = 180


def spark_home() -> Path:
    """Where pyspark is, or a skipped test."""
    pyspark = pytest.importorskip("pyspark", reason="pyspark is not installed: pip install .[spark]")
    pytest.importorskip("pandas", reason="pandas is not installed: pip install .[spark]")
    if shutil.which("java") is None:
        pytest.skip("no Java: install a JDK of version 17 or newer")
    return Path(pyspark.__file__).parent


def wait_until(condition: Callable[[], bool], what: str, seconds: float = SECONDS) -> None:
    """Look every 0.1 s until something is so.

    Raises:
        AssertionError: it never was.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.1)


class Cluster:
    """A master and `workers` workers of one core each; each worker with what it starts is a process group.

    Attributes:
        url: of the master, for `--master`.
        workers: their processes.
    """

    def __init__(self, folder: Path, workers: int) -> None:
        self._folder, self._home = folder, spark_home()
        self._port, self._page = free_port(), free_port()
        self.url = f"spark://{HOST}:{self._port}"
        self.workers: list[subprocess.Popen[bytes]] = []
        self._master = self._start("master.Master", "--port", self._port, "--webui-port", self._page)
        wait_until(lambda: self._state() is not None, "the master answers")
        for _ in range(workers):
            self.add_worker()

    def add_worker(self) -> None:
        """Start one more worker and wait until the master knows it."""
        known, number = self._alive(), len(self.workers)
        place = ["--work-dir", self._folder / f"worker-{number}", "--port", free_port(), "--webui-port", free_port()]
        self.workers.append(self._start("worker.Worker", "--cores", 1, "--memory", "1g", *place, self.url))
        wait_until(lambda: self._alive() > known, "the worker is registered")

    def close(self) -> None:
        """End every process."""
        for process in (*self.workers, self._master):
            kill_group(process)

    def _start(self, name: str, *arguments: object) -> "subprocess.Popen[bytes]":
        words = [self._home / "bin" / "spark-class", f"org.apache.spark.deploy.{name}", "--host", HOST, *arguments]
        with (self._folder / f"{name}-{len(self.workers)}.log").open("wb") as log:
            return subprocess.Popen(
                [str(word) for word in words],
                env=self.environment(SPARK_DAEMON_MEMORY="256m"),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def environment(self, **more: str) -> dict[str, str]:
        """The variables of all processes: nothing of this checkout is on the path of Python."""
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "SPARK_HOME")}
        path = f"{Path(sys.executable).parent}:{kept['PATH']}"
        scratch = {"SPARK_LOCAL_DIRS": str(self._folder / "scratch"), "TMPDIR": str(self._folder)}
        kept |= quick_java.ENVIRONMENT
        return {**kept, **scratch, "PATH": path, "SPARK_LOCAL_IP": HOST, "SPARK_HOME": str(self._home), **more}

    def _state(self) -> dict[str, object] | None:
        try:
            with urllib.request.urlopen(f"http://{HOST}:{self._page}/json/", timeout=5) as answer:
                found: dict[str, object] = json.load(answer)
        except (OSError, ValueError):
            return None
        return found

    def _alive(self) -> int:
        workers = (self._state() or {}).get("workers", [])
        assert isinstance(workers, list)
        return sum(worker["state"] == "ALIVE" for worker in workers)

    def submit(self, folder: Path, *words: object, python: str = sys.executable) -> "subprocess.Popen[bytes]":
        """Start a job from `folder`: `words` follow `spark-submit --master URL --deploy-mode client`.

        Output and errors go to `out` and `err` there. `python` is the Python of the executors.
        """
        local = ["--conf", f"spark.driver.host={HOST}", "--conf", f"spark.driver.bindAddress={HOST}"]
        command = ["spark-submit", "--master", self.url, "--deploy-mode", "client", *local, *map(str, words)]
        with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
            return subprocess.Popen(
                command,
                cwd=folder,
                env=self.environment(PYTHONPATH=str(ROOT), PYSPARK_PYTHON=python, PYSPARK_DRIVER_PYTHON=sys.executable),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    def run(self, folder: Path, *words: object, python: str = sys.executable) -> None:
        """Run a job to its end.

        Raises:
            AssertionError: it failed.
        """
        finish(self.submit(folder, *words, python=python), folder)


def finish(job: "subprocess.Popen[bytes]", folder: Path) -> None:
    """Wait for a job.

    Raises:
        AssertionError: it failed.
    """
    try:
        code = job.wait(SECONDS)
    finally:
        kill_group(job)
    assert code == 0, f"{(folder / 'out').read_text()[-2000:]}\n{(folder / 'err').read_text()[-4000:]}"


@contextlib.contextmanager
def running(folder: Path, workers: int) -> Iterator[Cluster]:
    """A cluster that is gone at the end."""
    folder.mkdir(parents=True)
    cluster = Cluster(folder, workers)
    try:
        yield cluster
    finally:
        cluster.close()
