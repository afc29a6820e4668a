"""A file system of Hadoop's that is not this machine's by its name, for tests."""

import hashlib
from pathlib import Path
from typing import Any


def mounted(spark: Any, folder: Path) -> str:
    """A folder as the URI of a mount table, in which paths are resolved by Hadoop alone."""
    name = "t" + hashlib.sha256(str(folder).encode()).hexdigest()[:8]
    conf = spark.sparkContext._jsc.hadoopConfiguration()
    conf.set(f"fs.viewfs.mounttable.{name}.link./top", f"file://{folder}")
    return f"viewfs://{name}/top"
