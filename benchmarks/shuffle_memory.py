"""Peak memory and scratch of the shuffle with data 8 times larger than its cap: one JSON line.

    python benchmarks/shuffle_memory.py [--memory 64M] [--cores 2]

Runs the command itself on token ids of 8 times the cap (4 bytes a token), and samples every 10 ms the memory of its
processes together (proportional set size, so that shared pages count once) and the size of its scratch files. Allowed:
the cap and 300 MiB of memory, and scratch of 3 times the input's size.
"""

import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from jllm.machine import parse_memory
from jllm.options import command, option

ALLOWANCE = 300 << 20
TIMES_CAP = 8
ALLOWED_SCRATCH = 3.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Options of the benchmark."""

    memory: str = option("64M", help="the cap")
    cores: int = option(2, help="workers")
    row_length: int = option(2049, help="tokens in a row")
    files: int = option(4, help="input files")
    folder: Path | None = option(None, help="where to work  [default: a temporary folder]")


def sample(process: subprocess.Popen[bytes], target: Path) -> tuple[int, int]:
    """The highest memory of a process and its children, and the largest scratch, until it ends."""
    import psutil

    memory = scratch = 0
    while process.poll() is None:
        total = 0
        try:
            root = psutil.Process(process.pid)
            for one in [root, *root.children(recursive=True)]:
                total += one.memory_full_info().pss
        except psutil.Error:
            pass  # ended in between
        memory = max(memory, total)
        scratch = max(scratch, _size(target, ".scratch/*"))
        time.sleep(0.01)
    return memory, scratch


def _size(folder: Path, pattern: str) -> int:
    total = 0
    for path in folder.rglob(pattern):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue  # used up in between
    return total


@command(BenchmarkConfig, name="shuffle_memory")
def main(config: BenchmarkConfig) -> None:
    """Measure the shuffle's peak memory and scratch."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from benchmarks.token_sets import write_set

    cap = parse_memory("--memory", config.memory)
    folder = Path(tempfile.mkdtemp(prefix="shuffle-", dir=config.folder))
    try:
        tokens = TIMES_CAP * cap // 4
        source = write_set(folder / "in", tokens=tokens, row_length=config.row_length, files=config.files)
        size = _size(source, "*.parquet")
        arguments = ["-d", str(source), "-o", str(folder / "out"), "--memory", config.memory]
        begin = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "jllm.shuffle_datasets", *arguments, "--cores", str(config.cores)],
            stdout=subprocess.DEVNULL,
        )
        memory, scratch = sample(process, folder / "out")
        seconds = time.perf_counter() - begin
        assert process.returncode == 0
    finally:
        shutil.rmtree(folder)
    report = {
        "benchmark": "shuffle_memory",
        "tokens": tokens,
        "cap_mib": cap >> 20,
        "peak_mib": memory >> 20,
        "over_cap_mib": (memory - cap) >> 20,
        "scratch_to_input": round(scratch / size, 2),
        "million_tokens_per_second": round(tokens / 1e6 / seconds, 1),
        "ratio": {
            "peak_to_allowed": round(memory / (cap + ALLOWANCE), 2),
            "scratch_to_allowed": round(scratch / size / ALLOWED_SCRATCH, 2),
        },
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
