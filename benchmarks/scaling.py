"""The data stages on 1, 2, 4, ... cores of this machine: one JSON line with a row for each stage and number of cores.

* `documents` and `chat`: raw2ids, MB/s by the slope between a small and a large input, cores busy, CPU seconds a GB.
* `main_share`: the share of the time in which the process that plans is busy, and `amdahl`, the speed-up over one
  worker that this allows. On a machine of few cores these say what more of them would give.
* `memory_mib`: the highest proportional memory of all processes together.
* `shuffle`: M tokens/s out of core; rows of 2049 tokens, `--shuffle_memory` as the cap.
* `loop`: a plain loop over `tokenizers` on as many cores, and `ratio`, how many times its speed the documents have.

The input is made of the Python files of the standard library, in any order and with other numbers in each copy, so
that what engines remember of a text does not help with the next one. The same in every run.

    python benchmarks/scaling.py [--cores 1,2,4] [--small 300] [--large 1500] [--plot scaling.svg]
"""

import dataclasses
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from jllm.options import command, option  # noqa: E402

MEGABYTE = 1_000_000
ROW = 2049
STAGES = ("documents", "chat", "shuffle")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Options of the benchmark."""

    tokenizer: str = option("qwen3", help="folder below JLLM_ASSETS/tokenizers, or a folder")
    cores: str = option("", help="numbers of cores by commas  [default: 1, 2, 4, ... and all]")
    stages: str = option(",".join(STAGES), help="stages by commas")
    small: int = option(300, help="megabytes of the small input")
    large: int = option(1500, help="megabytes of the large input")
    chat: int = option(400, help="megabytes of the large chat input; the small one is a quarter of it")
    tokens: int = option(400, help="million tokens of the shuffle")
    shuffle_memory: str = option("1G", help="cap of the shuffle")
    loop: int = option(24, help="megabytes for the loop; 0: no loop")
    folder: Path | None = option(None, help="where to work  [default: a temporary folder]")
    plot: Path | None = option(None, help="draw the table there, which needs matplotlib")
    role: str | None = option(None, help="run one part in this process", hidden=True)
    data: Path | None = option(None, help="input of the part", hidden=True)


@command(BenchmarkConfig, name="scaling")
def main(config: BenchmarkConfig) -> None:
    """Print one JSON line."""
    tokenizer = _tokenizer(config.tokenizer)
    if config.role == "loop":
        assert config.data is not None
        print(_loop(tokenizer, config.data))
        return
    here = len(os.sched_getaffinity(0))
    counts = [int(each) for each in config.cores.split(",") if each] or _doublings(here)
    stages = config.stages.split(",")
    folder = Path(tempfile.mkdtemp(prefix="scaling-", dir=config.folder))
    rows: list[dict[str, Any]] = []
    try:
        inputs = _inputs(folder, config, stages)
        for cores in counts:
            for stage in stages:
                row: dict[str, Any] = {"stage": stage, "cores": cores}
                row |= _shuffled(inputs, folder, config, cores) if stage == "shuffle" else _converted(
                    stage, inputs, tokenizer, folder, cores
                )  # fmt: skip
                if stage == "documents" and config.loop:
                    loop = _looped(inputs["loop"], config.tokenizer, cores)
                    row |= {"loop_mb_s": round(loop, 1), "ratio": round(float(row["mb_s"]) / loop, 1)}
                rows.append(row)
                print(json.dumps(row), file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(folder)
    if config.plot is not None:
        _draw(rows, config.plot)
    print(json.dumps({"benchmark": "scaling", "cores_here": here, "tokenizer": config.tokenizer, "rows": rows}))


def _doublings(most: int) -> list[int]:
    counts = [1]
    while counts[-1] * 2 <= most:
        counts.append(counts[-1] * 2)
    return counts if counts[-1] == most else [*counts, most]


def _tokenizer(name: str) -> Path:
    folder = Path(os.environ.get("JLLM_ASSETS", Path.home() / ".cache" / "jllm-assets")) / "tokenizers" / name
    for place in (folder, Path(name)):
        if place.is_dir():
            return place.resolve()
    sys.exit(f'{{"benchmark": "scaling", "skipped": "no tokenizer {name}: set JLLM_ASSETS, or give a folder"}}')


# The input.


def _texts(megabytes: int, seed: int) -> Iterator[str]:
    """Python files of the standard library, shuffled, each time with other numbers and names in them."""
    base = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" not in path.parts:
            try:
                base.append(path.read_text(encoding="utf-8"))
            except (UnicodeDecodeError, OSError):
                continue
    base = [text for text in base if text.strip()]
    rng = random.Random(seed)
    left = megabytes * MEGABYTE
    word = re.compile(r"\bself\b|\breturn\b|\b[0-9]{1,3}\b")
    while left > 0:
        rng.shuffle(base)
        for text in base:
            salt = f"{rng.randrange(1 << 30):x}"
            places = iter(word.split(text))
            text = next(places) + "".join(f"v{salt[number % 7 :]}{part}" for number, part in enumerate(places))
            left -= len(text)
            yield text
            if left <= 0:
                return


def _write(path: Path, megabytes: int, *, chat: bool) -> int:
    """Write about so many megabytes of JSON lines; the size. One copy of the library is varied, then written again with
    its lines in another order, each text with a line of its own before it."""
    import orjson

    size, at_once = 0, min(megabytes, 100)
    texts = list(_texts(at_once, 1))
    rng = random.Random(2)
    with path.open("wb") as file:
        while size < megabytes * MEGABYTE:
            rng.shuffle(texts)
            for text in texts:
                text = f"# {rng.randrange(1 << 40):x}\n{text}"
                lines = [_conversation(text)] if chat else [{"text": text}]
                size += sum(file.write(orjson.dumps(line) + b"\n") for line in lines)
                if size >= megabytes * MEGABYTE:
                    break
    return size


def _conversation(text: str) -> list[dict[str, str]]:
    """Turns of some lines, without what chat templates look for in a text."""
    lines = [line.strip() for line in text.replace("<", "(").split("\n")[:96]]
    turns = ["T: " + " ".join(filter(None, lines[at : at + 12])) + "." for at in range(0, max(24, len(lines)), 12)]
    return [
        {"user" if number % 2 == 0 else "assistant": turn} for number, turn in enumerate(turns[: len(turns) // 2 * 2])
    ]


def _inputs(folder: Path, config: BenchmarkConfig, stages: list[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    wanted = {"loop": (config.loop, False)} if config.loop else {}
    if "documents" in stages:
        wanted |= {"documents-small": (config.small, False), "documents-large": (config.large, False)}
    if "chat" in stages:
        wanted |= {"chat-small": (config.chat // 4, True), "chat-large": (config.chat, True)}
    for name, (megabytes, chat) in wanted.items():
        found[name] = folder / f"{name}.jsonl"
        _write(found[name], megabytes, chat=chat)
    if "shuffle" in stages:
        from benchmarks.token_sets import write_set

        found["shuffle"] = write_set(
            folder / "set" / "tokens", tokens=config.tokens * MEGABYTE, row_length=ROW, files=16
        )
    return found


# The stages.


@dataclasses.dataclass(frozen=True)
class _Used:
    """What a command took: seconds, processor seconds in all and of its first process, and memory."""

    wall: float
    cpu: float
    main: float
    memory: int


def _run(arguments: list[object], output: Path) -> _Used:
    shutil.rmtree(output, ignore_errors=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", *map(str, arguments)], cwd=ROOT, stdout=subprocess.DEVNULL)
    seen = {"memory": 0, "main": 0.0}
    watcher = threading.Thread(target=_watch, args=(process, seen), daemon=True)
    watcher.start()
    if process.wait():
        sys.exit(f"scaling: {' '.join(map(str, arguments))} ended with code {process.returncode}")
    wall = time.perf_counter() - begin
    watcher.join()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return _Used(wall=wall, cpu=cpu, main=float(seen["main"]), memory=int(seen["memory"]))


def _watch(process: "subprocess.Popen[bytes]", seen: dict[str, Any]) -> None:
    """Sample the memory of a process and its children, and the processor time of the process alone."""
    tick = os.sysconf("SC_CLK_TCK")
    while process.poll() is None:
        pids = [process.pid]
        try:
            pids += map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
            fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            seen["main"] = (int(fields[11]) + int(fields[12])) / tick
        except (OSError, IndexError, ValueError):
            continue
        seen["memory"] = max(seen["memory"], sum(map(_proportional, pids)))
        time.sleep(0.05 * len(pids) ** 0.5)


def _proportional(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    return 0


def _converted(stage: str, inputs: dict[str, Path], tokenizer: Path, folder: Path, cores: int) -> dict[str, Any]:
    """raw2ids on both inputs of a stage."""
    words: list[object] = ["--tokenizer", tokenizer, "--max_len", ROW, "--quiet", "--cores", cores]
    words += ["-t", "pretrain", "--stack"] if stage == "documents" else ["--chat_template", "chatml"]
    used = {
        size: _run(["jllm.raw2ids", "-i", inputs[f"{stage}-{size}"], "-o", folder / "out", *words], folder / "out")
        for size in ("small", "large")
    }
    small, large = used["small"], used["large"]
    gigabytes = (inputs[f"{stage}-large"].stat().st_size - inputs[f"{stage}-small"].stat().st_size) / 1e9
    wall = max(large.wall - small.wall, 1e-3)
    main, work = max(large.main - small.main, 0.0), max(large.cpu - small.cpu, 1e-9)
    return {
        "mb_s": round(1000 * gigabytes / wall, 1),
        "busy": round(work / wall, 2),
        "cpu_s_gb": round(work / gigabytes, 2),
        "main_s_gb": round(main / gigabytes, 3),
        "main_share": round(main / wall, 3),
        "amdahl": round((work - main) / max(main, 1e-9), 1),
        "memory_mib": large.memory >> 20,
        "whole_s": [round(small.wall, 2), round(large.wall, 2)],
    }


def _shuffled(inputs: dict[str, Path], folder: Path, config: BenchmarkConfig, cores: int) -> dict[str, Any]:
    out = folder / "shuffled"
    words = ["-d", inputs["shuffle"].parent, "-o", out, "--cores", cores, "--memory", config.shuffle_memory]
    used = _run(["jllm.shuffle_datasets", *words], out)
    shutil.rmtree(out, ignore_errors=True)
    return {
        "m_tokens_s": round(config.tokens / used.wall, 1),
        "busy": round(used.cpu / used.wall, 2),
        "memory_mib": used.memory >> 20,
        "whole_s": [round(used.wall, 2)],
    }


def _looped(data: Path, tokenizer: str, cores: int) -> float:
    """MB/s of the plain loop on so many cores."""
    environment = {**os.environ, "RAYON_NUM_THREADS": str(cores), "TOKENIZERS_PARALLELISM": "true"}
    line = [sys.executable, __file__, "--role", "loop", "--data", str(data), "--tokenizer", tokenizer]
    done = subprocess.run(line, check=True, cwd=ROOT, env=environment, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def _loop(folder: Path, data: Path) -> float:
    """Parse, encode 1,000 documents at a time, join; loading the tokenizer is not counted."""
    import numpy as np
    import tokenizers

    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.encode_batch_fast(["warm up"] * 100, add_special_tokens=False)
    begin = time.perf_counter()
    with data.open(encoding="utf-8") as lines:
        batch: list[str] = []
        for line in [*lines, ""]:
            if len(batch) == 1000 or not line:
                stream: list[int] = []
                for encoding in backend.encode_batch_fast(batch, add_special_tokens=False):
                    stream += encoding.ids
                np.array(stream, dtype=np.int32)
                batch = []
            if line:
                batch.append(json.loads(line)["text"])
    return data.stat().st_size / MEGABYTE / (time.perf_counter() - begin)


def _draw(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4))
    for stage in dict.fromkeys(row["stage"] for row in rows):
        found = [row for row in rows if row["stage"] == stage]
        cores = [row["cores"] for row in found]
        speed = [row.get("mb_s", row.get("m_tokens_s")) for row in found]
        axes[0].plot(cores, speed, marker="o", label=f"{stage}, {'MB/s' if 'mb_s' in found[0] else 'M tokens/s'}")
        axes[1].plot(cores, [row["busy"] for row in found], marker="o", label=stage)
    for axis, title in zip(axes, ("speed", "cores busy"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="cores", title=title)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
