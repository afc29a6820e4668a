"""Global shuffle against Spark, DuckDB and polars: same data, same cores, alternating, one JSON line with the ratios.

    python benchmarks/shuffle_peers.py [--tokens 100M] [--rounds 3] [--peers duckdb,polars,spark]

Every contender runs in its own process bound to `--cores` cores, and times its work after its imports (Spark: after
its session is up). jllm gets a quarter of the memory cap that DuckDB gets, so that both work out of core; polars holds
everything in memory; Spark gets 4 GiB of heap. All write zstd level 1; that jllm wrote all rows is checked.
"""

import dataclasses
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from jllm.machine import parse_count, parse_memory
from jllm.options import command, option

SEED = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Options of the benchmark."""

    tokens: str = option("100M", help="tokens to shuffle")
    row_length: int = option(2049, help="tokens in a row")
    files: int = option(8, help="input files")
    cores: int = option(2, help="cores for each contender")
    memory: str = option("256M", help="memory cap of jllm; 100M tokens are 400 MB, so it works out of core")
    peer_memory: str = option("1G", help="memory cap of DuckDB, which gives up at 512M")
    rounds: int = option(3, help="rounds; the median counts")
    peers: str = option("duckdb,polars,spark", help="contenders beside jllm")
    folder: Path | None = option(None, help="where to work  [default: a temporary folder]")
    contender: str | None = option(None, help="run one contender and print its seconds", hidden=True)


def run_jllm(source: Path, target: Path, config: BenchmarkConfig) -> float:
    from jllm.data.dataset.manifest import open_data_set
    from jllm.data.shuffle.data_set import Resources, shuffle_set
    from jllm.machine import use_thrifty_allocator

    use_thrifty_allocator()
    limits = Resources(cores=config.cores, memory=parse_memory("--memory", config.memory))
    begin = time.perf_counter()
    data_set = open_data_set(source)
    outcome = shuffle_set(data_set, target, blocks=config.files, seed=SEED, resources=limits)
    seconds = time.perf_counter() - begin
    assert outcome.manifest.rows == data_set.manifest.rows
    return seconds


def run_duckdb(source: Path, target: Path, config: BenchmarkConfig) -> float:
    import duckdb

    connection = duckdb.connect()
    connection.execute(f"SET threads={config.cores}")
    connection.execute(f"SET memory_limit='{parse_memory('--peer_memory', config.peer_memory)}B'")
    connection.execute(f"SET temp_directory='{target}.scratch'")
    connection.execute("SET preserve_insertion_order=true")
    begin = time.perf_counter()
    connection.execute(
        f"COPY (SELECT input_ids FROM read_parquet('{source}/**/*.parquet') ORDER BY random()) TO '{target}.parquet'"
        " (FORMAT parquet, COMPRESSION zstd, COMPRESSION_LEVEL 1)"
    )
    return time.perf_counter() - begin


def run_polars(source: Path, target: Path, config: BenchmarkConfig) -> float:
    import polars

    begin = time.perf_counter()
    frame = polars.read_parquet(sorted(source.rglob("*.parquet")), columns=["input_ids"])
    shuffled = frame.sample(fraction=1.0, shuffle=True, seed=SEED)
    shuffled.write_parquet(f"{target}.parquet", compression="zstd", compression_level=1)
    return time.perf_counter() - begin


def run_spark(source: Path, target: Path, config: BenchmarkConfig) -> float:
    from pyspark.sql import SparkSession
    from pyspark.sql.functions import rand

    session = (
        SparkSession.builder.master(f"local[{config.cores}]")
        .config("spark.driver.memory", "4g")
        .config("spark.driver.host", "127.0.0.1")
        .config("spark.driver.bindAddress", "127.0.0.1")
        .config("spark.local.dir", f"{target}.scratch")
        .config("spark.sql.shuffle.partitions", config.files)
        .config("spark.sql.parquet.compression.codec", "zstd")
        .config("spark.io.compression.zstd.level", "1")
        .config("spark.ui.enabled", "false")
        .getOrCreate()
    )
    session.sparkContext.setLogLevel("ERROR")
    frame = session.read.option("recursiveFileLookup", "true").parquet(str(source)).select("input_ids")
    begin = time.perf_counter()
    frame.orderBy(rand(SEED)).write.option("parquet.compression.codec.zstd.level", "1").parquet(str(target))
    seconds = time.perf_counter() - begin
    session.stop()
    return seconds


CONTENDERS: dict[str, Callable[[Path, Path, BenchmarkConfig], float]] = {
    "jllm": run_jllm,
    "duckdb": run_duckdb,
    "polars": run_polars,
    "spark": run_spark,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Taken:
    """What one run took. `cpu_seconds` are of the whole process, imports and start included."""

    seconds: float
    cpu_seconds: float


def time_contender(name: str, config: BenchmarkConfig, folder: Path) -> Taken | None:
    """One contender in a process of its own, or None where it fails, as DuckDB does for want of memory."""
    arguments = [f"--{field.name}={getattr(config, field.name)}" for field in dataclasses.fields(config)]
    arguments = [argument for argument in arguments if not argument.startswith(("--folder", "--contender"))]
    arguments += [f"--folder={folder}", f"--contender={name}"]
    environment = {**os.environ, "POLARS_MAX_THREADS": str(config.cores)}
    cores = sorted(os.sched_getaffinity(0))[: config.cores]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, __file__, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    for path in folder.glob("out*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if done.returncode:
        print(f"{name} failed: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Taken(seconds=float(done.stdout.strip().splitlines()[-1]), cpu_seconds=cpu)


@command(BenchmarkConfig, name="shuffle_peers")
def main(config: BenchmarkConfig) -> None:
    """Compare the global shuffle with Spark, DuckDB and polars."""
    if config.contender:
        assert config.folder is not None
        print(CONTENDERS[config.contender](config.folder / "in", config.folder / "out", config))
        return
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from benchmarks.token_sets import write_set

    folder = Path(tempfile.mkdtemp(prefix="shuffle-", dir=config.folder))
    try:
        tokens = parse_count("--tokens", config.tokens)
        source = write_set(folder / "in", tokens=tokens, row_length=config.row_length, files=config.files)
        size = sum(path.stat().st_size for path in source.rglob("*.parquet"))
        names = ["jllm", *filter(None, config.peers.split(","))]
        runs: dict[str, list[Taken]] = {name: [] for name in names}
        for _ in range(config.rounds):
            for name in names:
                taken = time_contender(name, config, folder)
                if taken is not None:
                    runs[name].append(taken)
                    print(f"{name}: {taken.seconds:.1f} s, {taken.cpu_seconds:.1f} CPU", file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(folder)
    runs = {name: taken for name, taken in runs.items() if taken}
    speed = {name: tokens / 1e6 / statistics.median(one.seconds for one in taken) for name, taken in runs.items()}
    cpu = {name: statistics.median(one.cpu_seconds for one in taken) for name, taken in runs.items()}
    report = {
        "benchmark": "shuffle_peers",
        "tokens": tokens,
        "bytes_per_token": round(size / tokens, 2),
        "cores": config.cores,
        "memory": config.memory,
        "duckdb_memory": config.peer_memory,
        "rounds": config.rounds,
        "million_tokens_per_second": {name: round(value, 1) for name, value in speed.items()},
        "cpu_seconds": {name: round(value, 1) for name, value in cpu.items()},
        "ratio": {name: round(speed["jllm"] / value, 2) for name, value in speed.items() if name != "jllm"},
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
