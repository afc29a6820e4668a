"""The cluster of the Spark jobs' tests, for tests of what they are made of."""

from tests.spark.cluster import spark as spark
