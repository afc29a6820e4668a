"""The session of a job: one that is there stays, and what Python is given at a time is bounded."""

from typing import Any

import pytest

from jllm.data.spark.claim import started_at
from jllm.data.spark.session import BATCH_ROWS, driver_of, job_session, set_up

pytestmark = pytest.mark.slow


def test_a_session_that_is_there_stays(spark: Any) -> None:
    with job_session("x", verbose=False) as found:
        assert found.sparkContext is spark.sparkContext
    assert spark.range(3).count() == 3


def test_sizes(spark: Any) -> None:
    set_up(spark)

    def sizes(batches: Any) -> Any:
        import pyarrow as pa

        for batch in batches:
            yield pa.RecordBatch.from_pydict({"n": [batch.num_rows]})

    found = spark.range(0, 3 * BATCH_ROWS, numPartitions=1).mapInArrow(sizes, "n long").collect()
    assert max(row.n for row in found) <= BATCH_ROWS


def test_the_driver_is_known(spark: Any) -> None:
    driver = driver_of(spark)
    assert driver.jvm is not None
    assert started_at(driver.jvm) is not None
    assert all("/spark-" in folder for folder in driver.scratch)
