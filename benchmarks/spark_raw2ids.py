"""The Spark job beside the local command, on as many cores: documents to rows, MB/s by the slope of two inputs.

    python benchmarks/spark_raw2ids.py [--cores 2] [--small 100] [--large 500] [--rounds 3]

`ratio` is the Spark job's speed over the local command's, under `local[N]` and with `--cores N`; rounds alternate, and
medians count. The bar is 0.5. `start_s` is what is left of the small input's time without its share of the slope.
"""

import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.raw2ids_corpus import MEGABYTE, tokenizer_folder, write_corpus  # noqa: E402
from jllm.options import command, option  # noqa: E402

ROW = 2049


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Options of the benchmark."""

    tokenizer: str = option("qwen3", help="folder below JLLM_ASSETS/tokenizers")
    cores: int = option(2, least=1, help="cores of either")
    small: int = option(100, help="megabytes of the small input")
    large: int = option(500, help="megabytes of the large input")
    rounds: int = option(3, help="rounds; medians count")
    folder: Path | None = option(None, help="where to work  [default: a temporary folder]")


@command(BenchmarkConfig, name="spark_raw2ids")
def main(config: BenchmarkConfig) -> None:
    """Print one JSON line."""
    tokenizer = tokenizer_folder(config.tokenizer)
    folder = Path(tempfile.mkdtemp(prefix="spark-", dir=config.folder))
    seconds: dict[str, dict[str, list[float]]] = {way: {"small": [], "large": []} for way in ("local", "spark")}
    try:
        sizes = {name: write_corpus(folder / f"{name}.jsonl", getattr(config, name)) for name in ("small", "large")}
        for _ in range(config.rounds):
            for name in sizes:
                for way, found in seconds.items():
                    words = ["-i", folder / f"{name}.jsonl", "-o", folder / "out", "--tokenizer", tokenizer]
                    shutil.rmtree(folder / "out", ignore_errors=True)
                    words += ["-t", "pretrain", "--stack", "--max_len", ROW]
                    found[name].append(_ran(way, [*map(str, words)], folder, config.cores))
    finally:
        shutil.rmtree(folder)
    report: dict[str, object] = {"benchmark": "spark_raw2ids", "tokenizer": config.tokenizer, "cores": config.cores}
    speeds = {}
    for way, found in seconds.items():
        small, large = (statistics.median(found[name]) for name in ("small", "large"))
        speeds[way] = (sizes["large"] - sizes["small"]) / MEGABYTE / (large - small)
        start = small - sizes["small"] / MEGABYTE / speeds[way]
        report[way] = {"mb_s": round(speeds[way], 1), "start_s": round(start, 1)}
    print(json.dumps({**report, "ratio": round(speeds["spark"] / speeds["local"], 2), "seconds": seconds}))


def _ran(way: str, words: list[str], folder: Path, cores: int) -> float:
    """Wall seconds of one command."""
    if way == "local":
        line = [sys.executable, "-m", "jllm.raw2ids", "--cores", str(cores), *words]
    else:
        import pyspark

        submit = Path(pyspark.__file__).parent / "bin" / "spark-submit"
        line = [str(submit), "--master", f"local[{cores}]", "--conf", "spark.ui.enabled=false"]
        line += [str(ROOT / "spark_jobs" / "raw2ids.py"), *words]
    known = {
        "PYTHONPATH": str(ROOT),
        "PYSPARK_PYTHON": sys.executable,
        "PYSPARK_DRIVER_PYTHON": sys.executable,
        "SPARK_LOCAL_IP": "127.0.0.1",
        "SPARK_LOCAL_DIRS": str(folder),
    }
    begin = time.perf_counter()
    done = subprocess.run(line, cwd=ROOT, env=os.environ | known, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(line)}\n{done.stderr[-3000:]}")
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
