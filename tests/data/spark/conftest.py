"""The cluster of the Spark jobs' tests, for tests of what they are made of."""

from tests.spark.conftest import spark as spark
