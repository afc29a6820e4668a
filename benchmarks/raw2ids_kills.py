"""raw2ids with 8 workers, killed at random moments and run again: what is the same, and how much is done twice.

For each mode an undisturbed run first; then again and again a run from nothing whose whole process group is stopped at
a random moment, looked at and killed, and the same command once more. One JSON line a mode: `identical` and `untouched`
of the `kills` (all files the same; files that were finished have the same inode and time), how many of them left
finished files behind, and the most input that was read before the kill and not saved, in MB a worker (bar: 64).

python benchmarks/raw2ids_kills.py [--kills 20] [--megabytes 100] [--modes stack,chats]
"""

import contextlib
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.raw2ids_corpus import MEGABYTE, tokenizer_folder, write_corpus  # noqa: E402
from jllm.errors import UserError  # noqa: E402
from jllm.options import command, option  # noqa: E402

WORKERS = 8
_SMALL = ("--num", "1500", "--batch_size", "400", "--max_len", "2049")
MODES: Mapping[str, Sequence[str]] = {
    "documents": ("-t", "pretrain"),
    "stack": ("-t", "pretrain", "--stack"),
    "best_fit": ("-t", "pretrain", "--packing", "best_fit"),
    "held_out": ("-t", "pretrain", "--stack", "--eval_fraction", "0.1"),
    "chats": ("-t", "ft", "--chat_template", "chatml", "--packing", "best_fit"),
    "pairs": ("-t", "preference", "--chat_template", "chatml"),
}
_SPEED = re.compile(r"finished in ([\d.]+) s, ([\d.]+) MB/s")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Options of the benchmark."""

    kills: int = option(20, help="kills a mode")
    megabytes: int = option(100, help="of input")
    modes: str = option(",".join(MODES), help="which ones")
    tokenizer: str = option("qwen3", help="folder below JLLM_ASSETS/tokenizers")
    seed: int = option(0, help="of the moments")


@command(BenchmarkConfig, name="raw2ids_kills")
def main(config: BenchmarkConfig) -> None:
    """Print a JSON line for each mode."""
    if unknown := set(config.modes.split(",")) - set(MODES):
        raise UserError(f"--modes {config.modes}: no mode {sorted(unknown)[0]!r}; give some of {','.join(MODES)}")
    tokenizer, moments = tokenizer_folder(config.tokenizer), random.Random(config.seed)
    folder = Path(tempfile.mkdtemp(prefix="raw2ids-"))
    try:
        write_corpus(folder / "text.jsonl", config.megabytes)
        _write_chats(folder)
        for mode in config.modes.split(","):
            print(json.dumps(_measured(mode, folder, tokenizer, config.kills, moments)), flush=True)
    finally:
        shutil.rmtree(folder)


def _write_chats(folder: Path) -> None:
    """The same texts as conversations, and as pairs of answers."""
    with (folder / "chats.jsonl").open("w") as chats, (folder / "pairs.jsonl").open("w") as pairs:
        for line in (folder / "text.jsonl").open():
            text = json.loads(line)["text"]
            parts = [
                part for start in range(0, min(len(text), 8000), 1000) if (part := text[start : start + 1000]).strip()
            ]
            if len(parts) < 3:
                continue
            roles = ("user", "assistant")
            messages = [
                {"role": roles[at % 2], "content": part} for at, part in enumerate(parts[: len(parts) // 2 * 2])
            ]
            chats.write(json.dumps({"messages": messages}) + "\n")
            for prompt, chosen, rejected in zip(*[iter(parts)] * 3, strict=False):
                pairs.write(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}) + "\n")


def _measured(mode: str, folder: Path, tokenizer: Path, kills: int, moments: random.Random) -> dict[str, object]:
    source = folder / {"chats": "chats.jsonl", "pairs": "pairs.jsonl"}.get(mode, "text.jsonl")
    arguments = ["-i", source, "--tokenizer", tokenizer, *MODES[mode], *_SMALL, "--cores", WORKERS]
    for name in ("first", "whole"):  # the first one writes caches
        begun = time.monotonic()
        output, _ = _start(arguments, folder / name / "out").communicate()
        seconds = time.monotonic() - begun
    wanted, size = _tree(folder / "whole"), source.stat().st_size
    found = {"identical": 0, "untouched": 0, "with_finished_files": 0}
    done = 0
    most = 0.0
    while done < kills:
        out = folder / "killed"
        shutil.rmtree(out, ignore_errors=True)
        process = _start(arguments, out / "out")
        time.sleep(seconds * moments.uniform(0.3, 1.0))
        if process.poll() is not None:
            continue
        os.killpg(process.pid, signal.SIGSTOP)
        read, finished = _read_by_workers(process.pid), _finished(out)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        done += 1
        output, _ = _start(arguments, out / "out").communicate()
        speed = _SPEED.search(output)
        fresh = float(speed[1]) * float(speed[2]) * MEGABYTE if speed else 0.0
        most = max(most, (read - max(size - fresh, 0.0)) / WORKERS / MEGABYTE)
        now = _finished(out)
        found["identical"] += _tree(out) == wanted
        found["untouched"] += all(now.get(path) == stamp for path, stamp in finished.items())
        found["with_finished_files"] += bool(finished)
    for name in ("first", "whole", "killed"):
        shutil.rmtree(folder / name, ignore_errors=True)
    return {
        "benchmark": "raw2ids_kills",
        "mode": mode,
        "workers": WORKERS,
        "megabytes": round(size / MEGABYTE),
        "kills": kills,
        **found,
        "again_mb_a_worker": round(most, 1),
    }


def _start(arguments: Sequence[object], out: Path) -> "subprocess.Popen[str]":
    out.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "jllm.raw2ids", *map(str, arguments), "-o", str(out)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def _read_by_workers(group: int) -> int:
    """Bytes that the children of a group's first process have read."""
    total = 0
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(entry.name) != group and int(fields[2]) == group:
                total += int((entry / "io").read_text().split()[1])
    return total


def _finished(folder: Path) -> dict[Path, tuple[int, int]]:
    """Shards that lie under their own names: inode and time."""
    shards = [path for path in folder.rglob("*.parquet") if not any(part[0] == "." for part in path.parts[1:])]
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in shards}


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


if __name__ == "__main__":
    main()
