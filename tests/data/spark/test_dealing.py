"""Rows dealt to partitions: the same ones in the same order each time, and about as many in each."""

import itertools
from typing import Any

import pytest

from jllm.data.spark.dealing import dealt, keys_of_partitions

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("count", [1, 7])
def test_the_same_each_time(spark: Any, count: int) -> None:
    def partitions() -> list[list[int]]:
        frame = spark.range(0, 500, numPartitions=5)
        return [[row.id for row in rows] for rows in dealt(spark, frame, count, "id").rdd.glom().collect()]

    first = partitions()
    assert first == partitions()
    assert sorted(itertools.chain(*first)) == list(range(500))
    assert all(rows == sorted(rows) for rows in first)
    assert max(map(len, first)) - min(map(len, first)) <= 1


def test_keys(spark: Any) -> None:
    keys = keys_of_partitions(spark, 9)
    assert len(set(keys)) == 9
    frame = spark.createDataFrame([(key,) for key in keys], "k int").repartition(9, "k")
    assert [[row.k for row in rows] for rows in frame.rdd.glom().collect()] == [[key] for key in keys]
