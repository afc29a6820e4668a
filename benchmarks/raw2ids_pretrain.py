"""raw2ids on documents against a plain loop over `tokenizers`, on the same text and the same cores, in one run.

The loop parses JSON lines, calls `encode_batch_fast` on 1,000 documents at a time, stacks the ids and writes the same
shards. Its speed does not depend on the size, so it gets a part of the text. Rounds alternate, medians count. Figures:

* `steady`: MB/s between the small and the large input (the slope), over the loop's MB/s; bar: 25 (Qwen3), 8 (Llama 2)
* `from_nothing`: the whole command on the small input, start included, over the loop at its own speed; bar: 12
* `of_engine`: `steady` as a share of fastokens' own speed, warm, on the same texts in memory; bar: 0.30

Wall times need a machine with nothing else to do. The same ratios by processor time (`cpu_ratio`, `cpu_of_engine`)
hold on a busy one; they say how much work there is, not how well the cores share it.

python benchmarks/raw2ids_pretrain.py [--tokenizer qwen3] [--small 200] [--large 1000] [--rounds 3]
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
    small: int = option(200, help="megabytes of the small input")
    large: int = option(1000, help="megabytes of the large input")
    loop: int = option(24, help="megabytes for the loop")
    rounds: int = option(3, help="rounds; medians count")
    folder: Path | None = option(None, help="where to work  [default: a temporary folder]")
    role: str | None = option(None, help="run one part in this process and print its seconds", hidden=True)
    data: Path | None = option(None, help="input of the part", hidden=True)


@command(BenchmarkConfig, name="raw2ids_pretrain")
def main(config: BenchmarkConfig) -> None:
    """Print one JSON line."""
    tokenizer = tokenizer_folder(config.tokenizer)
    if config.role is not None:
        assert config.data is not None
        part = {"loop": run_loop, "engine": run_engine}[config.role]
        print(*part(tokenizer, config.data))
        return
    folder = Path(tempfile.mkdtemp(prefix="raw2ids-", dir=config.folder))
    try:
        sizes = {name: write_corpus(folder / f"{name}.jsonl", getattr(config, name)) for name in ("small", "large")}
        sizes["loop"] = write_corpus(folder / "loop.jsonl", config.loop)
        names = ("small", "large", "loop", "engine")
        seconds: dict[str, list[float]] = {name: [] for name in names}
        work: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(config.rounds):
            for name in ("small", "large"):
                wall, spent = _raw2ids(folder / f"{name}.jsonl", tokenizer, folder / "out")
                seconds[name].append(wall)
                work[name].append(spent)
            for name, data in (("loop", "loop.jsonl"), ("engine", "small.jsonl")):
                wall, spent = _part(name, folder / data, config.tokenizer)
                seconds[name].append(wall)
                work[name].append(spent)
    finally:
        shutil.rmtree(folder)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    loop = sizes["loop"] / MEGABYTE / median["loop"]
    steady = (sizes["large"] - sizes["small"]) / MEGABYTE / (median["large"] - median["small"])
    whole = sizes["small"] / MEGABYTE / median["small"]
    engine = sizes["small"] / MEGABYTE / median["engine"]
    cpu = {name: statistics.median(values) for name, values in work.items()}
    ours_cpu = (cpu["large"] - cpu["small"]) / (sizes["large"] - sizes["small"])
    report = {
        "benchmark": "raw2ids_pretrain",
        "tokenizer": config.tokenizer,
        "loop_mb_s": round(loop, 2),
        "steady_mb_s": round(steady, 1),
        "from_nothing_mb_s": round(whole, 1),
        "engine_warm_mb_s": round(engine, 1),
        "ratio": round(steady / loop, 1),
        "from_nothing": round(whole / loop, 1),
        "of_engine": round(steady / engine, 2),
        "cpu_ratio": round(cpu["loop"] / sizes["loop"] / ours_cpu, 1),
        "cpu_of_engine": round(cpu["engine"] / sizes["small"] / ours_cpu, 2),
        "cpu_seconds": {name: [round(value, 2) for value in values] for name, values in work.items()},
        "seconds": {name: [round(value, 2) for value in values] for name, values in seconds.items()},
    }
    print(json.dumps(report))


def _raw2ids(source: Path, tokenizer: Path, output: Path) -> tuple[float, float]:
    """Wall and processor seconds of the command."""
    arguments = ["-i", source, "-o", output, "--tokenizer", tokenizer, "-t", "pretrain", "--stack", "--quiet", "-C"]
    begin, before = time.perf_counter(), os.times()
    subprocess.run(
        [sys.executable, "-m", "jllm.raw2ids", *map(str, arguments), "--max_len", str(ROW)],
        check=True,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - begin, cpu


def _part(role: str, data: Path, tokenizer: str) -> tuple[float, float]:
    command_line = [sys.executable, __file__, "--role", role, "--data", str(data), "--tokenizer", tokenizer]
    wall, cpu = subprocess.run(command_line, check=True, cwd=ROOT, capture_output=True, text=True).stdout.split()
    return float(wall), float(cpu)


def run_loop(tokenizer: Path, data: Path) -> tuple[float, float]:
    """The plain loop; loading the tokenizer is not counted."""
    import numpy as np
    import pyarrow as pa
    import tokenizers

    from jllm.data.dataset.shards import INPUT_IDS, ShardWriter, schema, to_list_array
    from jllm.data.tokenizer.document_end import document_end
    from jllm.data.tokenizer.facts import load_tokenizer

    facts = load_tokenizer(str(tokenizer))
    assert facts.backend is not None
    eos_id = document_end(facts)
    assert eos_id is not None
    backend = tokenizers.Tokenizer.from_str(facts.backend)
    backend.encode_batch_fast(["warm up"], add_special_tokens=False)
    begin, before = time.perf_counter(), time.process_time()
    stream: list[int] = []
    with (
        data.open() as lines,
        ShardWriter(data.with_suffix(".parquet"), columns=[INPUT_IDS]) as writer,
    ):
        batch: list[str] = []

        def flush() -> None:
            for encoding in backend.encode_batch_fast(batch, add_special_tokens=False):
                stream.extend(encoding.ids)
                stream.append(eos_id)
            rows = (len(stream) - 1) // (ROW - 1)
            values = [token for row in range(rows) for token in stream[row * (ROW - 1) : row * (ROW - 1) + ROW]]
            column = to_list_array(np.array(values, dtype=np.int32), np.arange(rows + 1, dtype=np.int64) * ROW)
            writer.write(pa.RecordBatch.from_arrays([column], schema=schema([INPUT_IDS])))
            del stream[: rows * (ROW - 1)]
            batch.clear()

        for line in lines:
            batch.append(json.loads(line)["text"])
            if len(batch) == 1000:
                flush()
        flush()
    return time.perf_counter() - begin, time.process_time() - before


def run_engine(tokenizer: Path, data: Path) -> tuple[float, float]:
    """fastokens alone: the second pass over texts that are in memory."""
    from jllm.data.tokenizer.engines import FastEngine
    from jllm.data.tokenizer.facts import load_tokenizer

    facts = load_tokenizer(str(tokenizer))
    assert facts.backend is not None
    engine = FastEngine(facts.backend)
    with data.open() as lines:
        texts = [json.loads(line)["text"] for line in lines]
    for _ in range(2):
        begin, before = time.perf_counter(), time.process_time()
        for start in range(0, len(texts), 1000):
            engine.encode(texts[start : start + 1000])
        spent = time.perf_counter() - begin, time.process_time() - before
    return spent


if __name__ == "__main__":
    main()
