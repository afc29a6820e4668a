"""A real cluster of two executor processes, for all tests of the Spark jobs."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.spark import quick_java

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """`local-cluster[2,1,1024]`: two executors, each a process of its own, whose fast engine may lie
    (`lying_daemon.py`)."""
    pyspark = pytest.importorskip("pyspark", reason="pyspark is not installed: pip install .[spark]")
    pytest.importorskip("pandas", reason="pandas is not installed: pip install .[spark]")
    if shutil.which("java") is None and "JAVA_HOME" not in os.environ:
        pytest.skip("no Java: install a JDK of version 17 or newer")
    from pyspark.sql import SparkSession

    home = os.path.dirname(pyspark.__file__)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in quick_java.ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.setenv("SPARK_HOME", home)
        patch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
        patch.setenv("PYSPARK_PYTHON", sys.executable)
        patch.setenv("PYSPARK_DRIVER_PYTHON", sys.executable)
        session = (
            SparkSession.builder.master("local-cluster[2,1,1024]")
            .config("spark.driver.host", "127.0.0.1")
            .config("spark.driver.bindAddress", "127.0.0.1")
            .config("spark.ui.enabled", "false")
            .config("spark.executorEnv.PYTHONPATH", str(ROOT))
            .config("spark.local.dir", str(tmp_path_factory.mktemp("spark")))
            .config("spark.sql.warehouse.dir", str(tmp_path_factory.mktemp("warehouse")))
            .config("spark.log.level", "ERROR")
            .config("spark.python.daemon.module", "tests.spark.lying_daemon")
            .getOrCreate()
        )
        work = Path(home, "work", session.sparkContext.applicationId)
        yield session
        session.stop()
        shutil.rmtree(work, ignore_errors=True)
