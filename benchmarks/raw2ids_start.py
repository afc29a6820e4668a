"""What raw2ids does to start and to end sooner, each taken away in turn: seconds of a whole command on a small input.

    python benchmarks/raw2ids_start.py [--megabytes 5] [--rounds 5]

* `early`: engines are built while the command gets ready (`data/tokenizer/early.py`).
* `leaving`: the process ends without taking apart what it holds (`machine.leave_at_once`).

Each with what is known of the tokenizer already there (`known`), and with nothing there (`unknown`); rounds alternate,
medians count. `ratio` is the time without over the time with.
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

from benchmarks.raw2ids_corpus import tokenizer_folder, write_corpus  # noqa: E402
from jllm.options import command, option  # noqa: E402

WAYS = {
    "both": "",
    "without early": (
        "import jllm.data.tokenizer.early as early\n"
        "nothing = {'_backend': None, '_reference': None, '_threads': []}\n"
        "early.EarlyEngines.__init__ = lambda self, *given, **named: vars(self).update(nothing)\n"
    ),
    "without leaving": "face.leave_at_once = lambda code=0: sys.exit(code)\n",
}
"""What is done before the command, by way."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Options of the benchmark."""

    tokenizer: str = option("qwen3", help="folder below JLLM_ASSETS/tokenizers")
    megabytes: int = option(5, help="of the input")
    rounds: int = option(5, help="rounds; medians count")


@command(BenchmarkConfig, name="raw2ids_start")
def main(config: BenchmarkConfig) -> None:
    """Print one JSON line."""
    tokenizer = tokenizer_folder(config.tokenizer)
    folder = Path(tempfile.mkdtemp(prefix="start-"))
    seconds: dict[str, dict[str, list[float]]] = {each: {way: [] for way in WAYS} for each in ("known", "unknown")}
    try:
        write_corpus(folder / "data.jsonl", config.megabytes)
        words = ["-i", folder / "data.jsonl", "-o", folder / "out", "--tokenizer", tokenizer]
        words += ["-C", "--quiet", "-t", "pretrain"]
        for number in range(config.rounds + 1):
            for what, found in seconds.items():
                for way, before in WAYS.items():
                    cache = folder / ("cache" if what == "known" else f"cache-{number}-{way}")
                    took = _ran(before, [*map(str, words)], cache)
                    if number:  # the first round fills the caches
                        found[way].append(took)
    finally:
        shutil.rmtree(folder)
    report: dict[str, object] = {"benchmark": "raw2ids_start", "tokenizer": config.tokenizer}
    for what, found in seconds.items():
        median = {way: statistics.median(each) for way, each in found.items()}
        ratios = {way: round(median[way] / median["both"], 3) for way in WAYS if way != "both"}
        report[what] = {"seconds": {way: round(each, 2) for way, each in median.items()}, "ratio": ratios}
    print(json.dumps(report))


def _ran(before: str, words: list[str], cache: Path) -> float:
    """Wall seconds of one command."""
    code = f"import sys\nimport jllm.commands.raw2ids as face\n{before}face.run()"
    known = {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(cache)}
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *words], env=os.environ | known, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
