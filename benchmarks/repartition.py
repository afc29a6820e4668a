"""Repartition of 1,000 files by renames: one JSON line with the seconds and their share of the allowed 2 s.

python benchmarks/repartition.py [--files 1000] [--rounds 3]
"""

import dataclasses
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from jllm.options import command, option

ALLOWED_SECONDS = 2.0
SETS = 4
PARTITIONS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Options of the benchmark."""

    files: int = option(1000, help="files, in four data sets")
    rounds: int = option(3, help="rounds; the median counts")
    folder: Path | None = option(None, help="where to work  [default: a temporary folder]")


@command(BenchmarkConfig, name="repartition")
def main(config: BenchmarkConfig) -> None:
    """Time repartition, planning and checking of the files included."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from benchmarks.token_sets import write_set
    from jllm.data.shuffle.repartition import make_plan, repartition

    folder = Path(tempfile.mkdtemp(prefix="repartition-", dir=config.folder))
    seconds = []
    try:
        source = write_set(folder / "set", tokens=256 * config.files, row_length=32, files=config.files // SETS)
        for round_number in range(config.rounds):
            target = folder / str(round_number)
            for index in range(SETS):
                shutil.copytree(source, target / f"set{index}")
            inodes = {path.stat().st_ino for path in target.rglob("*.parquet")}
            begin = time.perf_counter()
            repartition(target, make_plan(target, PARTITIONS, None))
            seconds.append(time.perf_counter() - begin)
            assert inodes == {path.stat().st_ino for path in target.rglob("*.parquet")}, "files were copied"
    finally:
        shutil.rmtree(folder)
    median = statistics.median(seconds)
    ratio = round(median / ALLOWED_SECONDS, 2)
    report = {"benchmark": "repartition", "files": config.files, "seconds": round(median, 2), "ratio": ratio}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
