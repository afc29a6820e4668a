"""Rows to partitions by their number, the same ones in the same order whatever Spark does in between.

Spark's own dealing gives rows in the order in which they happen to arrive from other machines.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

_KEY = "_jllm_key"


def keys_of_partitions(spark: "SparkSession", count: int) -> tuple[int, ...]:
    """For every partition a number that Spark's hash partitioning sends there."""
    from pyspark.sql.functions import col, hash, lit, pmod

    found: dict[int, int] = {}
    start = 0
    while len(found) < count:
        end = start + 16 * count
        numbers = spark.range(start, end, numPartitions=1).select(col("id").cast("int").alias("id"))
        for number, partition in numbers.select("id", pmod(hash("id"), lit(count))).collect():
            found.setdefault(partition, number)
        start = end
    return tuple(found[partition] for partition in range(count))


def dealt(spark: "SparkSession", frame: "DataFrame", count: int, number: str) -> "DataFrame":
    """The rows in so many partitions of about one size, each sorted by the column `number`, whose values differ."""
    from pyspark.sql.functions import array, col, element_at, lit, pmod

    keys = array(*map(lit, keys_of_partitions(spark, count)))
    keyed = frame.withColumn(_KEY, element_at(keys, (pmod(col(number), lit(count)) + 1).cast("int")))
    return keyed.repartition(count, _KEY).sortWithinPartitions(number).drop(_KEY)
