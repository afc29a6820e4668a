"""raw2ids on conversations against transformers' own loop, in one run.

The loop calls `apply_chat_template(..., return_assistant_tokens_mask=True)` on each conversation, with a template
that has generation markers, and keeps ids and mask. Conversations are chatalpaca's, from JLLM_DATA, repeated; without
that file, conversations are made of documentation text of about the same shape. `ratio` is the command's speed, start
included, over the loop's; `cpu_ratio` the same by processor time; bar: 15.

python benchmarks/raw2ids_chat.py [--times 50] [--rounds 3]
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
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.raw2ids_corpus import MEGABYTE, tokenizer_folder  # noqa: E402
from jllm.options import command, option  # noqa: E402

LOOP_CONVERSATIONS = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Options of the benchmark."""

    times: int = option(50, help="how often the conversations are repeated")
    rounds: int = option(3, help="rounds; medians count")
    template: str = option("chatml", help="built-in template, for both")
    folder: Path | None = option(None, help="where to work  [default: a temporary folder]")
    data: Path | None = option(None, help="input of the loop, run in this process", hidden=True)


@command(BenchmarkConfig, name="raw2ids_chat")
def main(config: BenchmarkConfig) -> None:
    """Print one JSON line."""
    tokenizer = tokenizer_folder("qwen3")
    if config.data is not None:
        print(*run_loop(tokenizer, config.data, config.template))
        return
    folder = Path(tempfile.mkdtemp(prefix="raw2ids-", dir=config.folder))
    try:
        once = _conversations()
        (folder / "once.jsonl").write_bytes(once)
        (folder / "many.jsonl").write_bytes(once * config.times)
        speeds: dict[str, list[float]] = {"loop": [], "raw2ids": []}
        work: dict[str, list[float]] = {"loop": [], "raw2ids": []}
        for _ in range(config.rounds):
            loop = [sys.executable, __file__, "--data", str(folder / "once.jsonl"), "--template", config.template]
            out = subprocess.run(loop, check=True, cwd=ROOT, capture_output=True, text=True).stdout
            wall, spent, megabytes = map(float, out.split()[-3:])
            speeds["loop"].append(megabytes / wall)
            work["loop"].append(megabytes / spent)
            begin, before = time.perf_counter(), os.times()
            arguments = ["-i", folder / "many.jsonl", "-o", folder / "out", "--tokenizer", tokenizer, "--quiet", "-C"]
            arguments += ["--chat_template", config.template, "--max_len", 2049]
            subprocess.run([sys.executable, "-m", "jllm.raw2ids", *map(str, arguments)], check=True, cwd=ROOT,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
            after = os.times()
            megabytes = len(once) * config.times / MEGABYTE
            speeds["raw2ids"].append(megabytes / (time.perf_counter() - begin))
            spent = after.children_user + after.children_system - before.children_user - before.children_system
            work["raw2ids"].append(megabytes / spent)
    finally:
        shutil.rmtree(folder)
    median = {name: statistics.median(values) for name, values in speeds.items()}
    per_cpu = {name: statistics.median(values) for name, values in work.items()}
    report = {
        "benchmark": "raw2ids_chat",
        "loop_mb_s": round(median["loop"], 2),
        "raw2ids_mb_s": round(median["raw2ids"], 1),
        "ratio": round(median["raw2ids"] / median["loop"], 1),
        "cpu_ratio": round(per_cpu["raw2ids"] / per_cpu["loop"], 1),
        "mb_per_cpu_second": {name: round(value, 2) for name, value in per_cpu.items()},
    }
    print(json.dumps(report))


def _conversations() -> bytes:
    """JSON lines of conversations."""
    path = Path(os.environ.get("JLLM_DATA", "."), "chatalpaca-1k.jsonl")
    if path.is_file():
        return path.read_bytes().rstrip(b"\n") + b"\n"
    from pydoc_data.topics import topics

    paragraphs = [part for topic in topics.values() for part in topic.split("\n\n") if 100 < len(part) < 900]
    rows = []
    for start in range(0, len(paragraphs) - 8, 8):
        roles = ("user", "assistant") * 4
        chosen = paragraphs[start : start + 8]
        messages = [{"role": role, "content": text} for role, text in zip(roles, chosen, strict=True)]
        rows.append(json.dumps({"messages": messages}))
    return ("\n".join(rows) + "\n").encode()


def run_loop(tokenizer: Path, data: Path, template: str) -> tuple[float, float, float]:
    """transformers' loop: wall seconds, processor seconds, megabytes; loading is not counted."""
    import transformers

    from jllm.data.chat.builtin_templates import TEMPLATES

    loaded = transformers.AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    lines = data.read_text(encoding="utf-8").splitlines()[:LOOP_CONVERSATIONS]
    rows = []
    begin, before = time.perf_counter(), time.process_time()
    for line in lines:
        encoded: Any = loaded.apply_chat_template(
            json.loads(line)["messages"],
            chat_template=TEMPLATES[template],
            return_assistant_tokens_mask=True,
            return_dict=True,
        )
        rows.append((encoded["input_ids"], encoded["assistant_masks"]))
    spent = time.perf_counter() - begin, time.process_time() - before
    return *spent, sum(len(line.encode()) for line in lines) / MEGABYTE


if __name__ == "__main__":
    main()
