"""Memory of raw2ids: the most that all its processes hold together, on a small and on a ten times larger input.

Counts the proportional set size of the command and its children every 50 ms, so that shared pages count once. The bar
is 1.5 GiB for either input; `ratio` is the larger of the two peaks over the bar, `growth` the large input's peak over
the small's.

With `--document`, the input is one document of that size instead, and `ratio` is the peak over its bytes. With `--rest`
it lies in the middle of small ones of so many megabytes together: `seconds` has all three, and `wall_ratio` is the time
of both together over the longer of the others. Two cores cannot reach 1 where both take about as long.

python benchmarks/raw2ids_memory.py [--tokenizer qwen3] [--small 200] [--large 2000]
python benchmarks/raw2ids_memory.py --document 500 --rest 200
"""

import contextlib
import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.raw2ids_corpus import tokenizer_folder, write_corpus  # noqa: E402
from jllm.errors import UserError  # noqa: E402
from jllm.options import command, option  # noqa: E402

BAR = 1.5 * (1 << 30)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Options of the benchmark."""

    tokenizer: str = option("qwen3", help="folder below JLLM_ASSETS/tokenizers")
    small: int = option(200, help="megabytes of the small input")
    large: int = option(2000, help="megabytes of the large input")
    record: int = option(16, help="megabytes of one long record that is put into either input; 0 for none")
    document: int | None = option(None, help="megabytes of a single document, measured instead", metavar="N")
    rest: int | None = option(None, help="megabytes of small documents around it", metavar="N")
    folder: Path | None = option(None, help="where to work  [default: a temporary folder]")


@command(BenchmarkConfig, name="raw2ids_memory")
def main(config: BenchmarkConfig) -> None:
    """Print one JSON line."""
    if config.rest and not config.document:
        raise UserError(f"--rest {config.rest}: is around a --document; give that too, or drop it")
    tokenizer = tokenizer_folder(config.tokenizer)
    folder = Path(tempfile.mkdtemp(prefix="raw2ids-", dir=config.folder))
    peaks = {}
    try:
        if config.document:
            print(json.dumps(_one_document(folder, tokenizer, config)))
            return
        for name in ("small", "large"):
            source = folder / f"{name}.jsonl"
            write_corpus(source, getattr(config, name))
            if config.record:
                _append_long_record(source, config.record)
            peaks[name] = _peak(source, tokenizer, folder / "out")
            source.unlink()
    finally:
        shutil.rmtree(folder)
    report = {
        "benchmark": "raw2ids_memory",
        "tokenizer": config.tokenizer,
        "peak_mib": {name: round(peak / (1 << 20)) for name, peak in peaks.items()},
        "growth": round(peaks["large"] / peaks["small"], 2),
        "ratio": round(max(peaks.values()) / BAR, 2),
    }
    print(json.dumps(report))


def _one_document(folder: Path, tokenizer: Path, config: BenchmarkConfig) -> dict[str, Any]:
    assert config.document is not None
    source = folder / "document.jsonl"
    _append_long_record(source, config.document)
    size = source.stat().st_size
    inputs = {"document": source}
    if config.rest:
        inputs |= {"rest": folder / "rest.jsonl", "both": folder / "both.jsonl"}
        write_corpus(inputs["rest"], config.rest)
        lines = inputs["rest"].read_bytes().splitlines(keepends=True)
        lines.insert(len(lines) // 2, source.read_bytes())
        with inputs["both"].open("wb") as file:
            file.writelines(lines)
        del lines
    peaks, seconds = {}, {}
    for name, path in inputs.items():
        begin = time.monotonic()
        peaks[name] = _peak(path, tokenizer, folder / "out")
        seconds[name] = time.monotonic() - begin
    found = {
        "benchmark": "raw2ids_memory",
        "tokenizer": config.tokenizer,
        "document_mb": round(size / 1e6),
        "peak_mib": {name: round(peak / (1 << 20)) for name, peak in peaks.items()},
        "seconds": {name: round(each, 1) for name, each in seconds.items()},
        "ratio": round(max(peaks.values()) / size, 2),
    }
    if config.rest:
        found["wall_ratio"] = round(seconds["both"] / max(seconds["document"], seconds["rest"]), 2)
    return found


def _append_long_record(path: Path, megabytes: int) -> None:
    from benchmarks.raw2ids_corpus import texts

    parts: list[str] = []
    size = 0
    while size < megabytes * 1_000_000:
        for text in texts():
            parts.append(text)
            size += len(text)
            if size >= megabytes * 1_000_000:
                break
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"text": "".join(parts)}) + "\n")


def _peak(source: Path, tokenizer: Path, output: Path) -> int:
    arguments = ["-i", source, "-o", output, "--tokenizer", tokenizer, "-t", "pretrain", "--stack", "--quiet", "-C"]
    arguments += ["--max_record", "2G"]
    process = subprocess.Popen(
        [sys.executable, "-m", "jllm.raw2ids", *map(str, arguments)], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(_proportional(pid) for pid in _family(process.pid)))
        time.sleep(0.05)
    assert process.returncode == 0, "raw2ids failed"
    return peak


def _family(pid: int) -> list[int]:
    found = [pid]
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += _family(int(child))
    return found


def _proportional(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    main()
