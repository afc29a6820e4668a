"""The training stream alone, without a model: how fast, how much memory, how quickly it reaches any row.

    python benchmarks/stream.py                      # all three on a set of 2**30 tokens (1.5 GB on disk, removed)
    python benchmarks/stream.py --what seek --tokens 100000000

Makes a data set of packed rows of 2,049 tokens that compress like real text, then prints one JSON line for each of:

speed   micro-batches through `train_steps` with its read-ahead on one core, against the usual loop (pyarrow batches →
        Python lists → `torch.tensor`) in the same process. Per core means per second of processor time, of all
        threads together; the wall clock stands beside it. Each is the best of several rounds in turn, as other work
        on the machine only slows them. Bar: 20 M tokens/s.
memory  growth of the process's private memory, sampled, over a window-shuffled pass of part of the set, from before
        the index is opened. Bar: 256 MiB.
seek    a fresh process opens the index, then asks `train_steps` for the step at a random row; the files are dropped
        from the page cache before. Bar: 1 s for the slowest; opening the index is reported beside it.

Each measurement runs in a process of its own. The exit code is 1 where a bar is missed.
"""

import argparse
import dataclasses
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.token_sets import VOCABULARY, PhraseTable  # noqa: E402
from jllm.data.dataset.manifest import Manifest, entry_of_written, open_data_set, write_manifest  # noqa: E402
from jllm.data.dataset.shards import (  # noqa: E402
    CU_SEQLENS,
    INPUT_IDS,
    ShardWriter,
    file_name,
    schema,
    to_list_array,
)

ROW = 2049
FILE_TOKENS = 1 << 25
DOCUMENTS_PER_ROW = 4
GLOBAL_BATCH = 16
EPOCH = 3
"""Any but the first, so that nothing depends on the order of the files."""

SPEED_ROUNDS = 4
SPEED_BAR, MEMORY_BAR, SEEK_BAR = 20e6, 256.0, 1.0
WHATS = ("speed", "memory", "seek")


def make_set(folder: Path, tokens: int) -> None:
    """Write one shard and copy it until there are `tokens` tokens; every copy is a file of its own to the reader."""
    rng, table = np.random.default_rng(0), PhraseTable()
    rows_of_file = min(FILE_TOKENS, tokens) // ROW
    files = max(1, tokens // (rows_of_file * ROW))
    stem = f"{folder.name}-00000"
    first = folder / stem / file_name(stem, 0, "zstd")
    with ShardWriter(first, columns=[INPUT_IDS, CU_SEQLENS]) as writer:
        for start in range(0, rows_of_file, 512):
            count = min(512, rows_of_file - start)
            writer.write(packed_rows(rng, table, count))
    entries = [entry_of_written(first, folder, writer.statistics)]
    for number in range(1, files):
        path = first.with_name(file_name(stem, number, "zstd"))
        shutil.copyfile(first, path)
        entries.append(dataclasses.replace(entries[0], path=path.relative_to(folder).as_posix()))
    write_manifest(folder, Manifest(command="benchmark", options={}, files=tuple(entries)))


def packed_rows(rng: np.random.Generator, table: PhraseTable, count: int) -> pa.RecordBatch:
    """`count` rows of `DOCUMENTS_PER_ROW` documents each."""
    ids = to_list_array(table.tokens(rng, count * ROW), np.arange(count + 1, dtype=np.int64) * ROW)
    bounds = np.sort(rng.integers(1, ROW, (count, DOCUMENTS_PER_ROW + 1)), axis=1).astype(np.int32)
    bounds[:, 0], bounds[:, -1] = 0, ROW
    offsets = np.arange(count + 1, dtype=np.int64) * (DOCUMENTS_PER_ROW + 1)
    columns = [ids, to_list_array(bounds.ravel(), offsets)]
    return pa.RecordBatch.from_arrays(columns, schema=schema([INPUT_IDS, CU_SEQLENS]))


def share(*, block_mask: bool) -> Any:
    """One pipeline that takes all of a step: 4 micro-batches of 4 rows."""
    from jllm.train.data.loader import BatchShare

    return BatchShare(
        micro_batch=4,
        accumulation=GLOBAL_BATCH // 4,
        data_rank=0,
        data_size=1,
        seq_len=ROW - 1,
        block_mask=block_mask,
        vocab_size=VOCABULARY + 1,
    )


def timed(read: Callable[[], int]) -> dict[str, float]:
    """Tokens a second that `read` counts, by processor time of all threads and by the clock."""
    processor, clock = time.process_time(), time.perf_counter()
    tokens = read()
    processor, clock = time.process_time() - processor, time.perf_counter() - clock
    return {"per_core": round(tokens / processor), "per_second": round(tokens / clock)}


def measure_speed(folder: Path, tokens: int) -> dict[str, Any]:
    """Tokens a second of the stream, with and without document positions, and of the usual loop, on one core."""
    os.sched_setaffinity(0, {random.choice(sorted(os.sched_getaffinity(0)))})
    import pyarrow.parquet as pq
    import torch

    from jllm.train.data.loader import Cursor, ReadAhead, train_steps
    from jllm.train.data.rows import ShardIndex

    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    data_set = open_data_set(folder)
    index = ShardIndex(data_set)

    tokens //= SPEED_ROUNDS

    def stream(block_mask: bool) -> int:
        steps = ReadAhead(
            train_steps(
                index, share(block_mask=block_mask), seed=1, shuffle=True, cursor=Cursor(epoch=EPOCH), ahead=True
            )
        )
        seen = 0
        for step in steps:
            assert len(step.micro_batches) == GLOBAL_BATCH // 4
            seen += step.tokens
            if seen >= tokens:
                break
        steps.close()
        return seen

    def usual(most: int) -> int:
        seen = 0
        for path in data_set.paths:
            for batch in pq.ParquetFile(path).iter_batches(GLOBAL_BATCH, columns=[INPUT_IDS], use_threads=False):
                input_ids = torch.tensor([row[INPUT_IDS] for row in batch.to_pylist()])
                labels = input_ids.clone()
                seen += labels[:, 1:].numel()
                if seen >= most:
                    return seen
        return seen

    peer, plain, masked = (
        {name: max(each[name] for each in rounds) for name in rounds[0]}
        for rounds in zip(
            *(
                (timed(lambda: usual(tokens // 16)), timed(lambda: stream(False)), timed(lambda: stream(True)))
                for _ in range(SPEED_ROUNDS)
            ),
            strict=True,
        )
    )
    return {
        "benchmark": "stream_speed",
        "ratio": round(min(plain["per_core"], masked["per_core"]) / peer["per_core"], 1),
        "bar": SPEED_BAR,
        "met": min(plain["per_core"], masked["per_core"]) >= SPEED_BAR,
        "tokens_per_second": plain,
        "with_block_mask": masked,
        "usual_loop": peer,
    }


def private_mib() -> float:
    """Memory that this process shares with nobody, by the kernel's account."""
    kib = 0
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith(("Private_Clean:", "Private_Dirty:")):
            kib += int(line.split()[1])
    return kib / 1024


def measure_memory(folder: Path, tokens: int) -> dict[str, Any]:
    """The most that private memory grows over a pass of `tokens` tokens, sampled every 20 ms."""
    from jllm.train.data.loader import Cursor, ReadAhead, train_steps
    from jllm.train.data.rows import ShardIndex

    before = private_mib()
    peaks = [before]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peaks.append(private_mib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    index = ShardIndex(open_data_set(folder))
    opened = private_mib()
    steps = ReadAhead(
        train_steps(index, share(block_mask=True), seed=1, shuffle=True, cursor=Cursor(epoch=EPOCH), ahead=True)
    )
    seen = 0
    for step in steps:
        seen += step.tokens
        if seen >= tokens:
            break
    steps.close()
    done.set()
    watcher.join()
    half = peaks[len(peaks) // 2 :]
    grown = max(peaks) - before
    return {
        "benchmark": "stream_memory",
        "ratio": round(grown / MEMORY_BAR, 3),
        "bar": MEMORY_BAR,
        "met": grown <= MEMORY_BAR,
        "growth_mib": round(grown, 1),
        "of_the_index_mib": round(opened - before, 1),
        "median_of_second_half_mib": round(statistics.median(half) - before, 1),
        "samples": len(peaks),
        "tokens_read": seen,
        "data_set_mib": round(index.num_rows * ROW * 4 / 2**20),
    }


def seek(folder: Path, row: int) -> dict[str, float]:
    """In this fresh process: open the index, then reach `row`."""
    from jllm.train.data.loader import Cursor, train_steps
    from jllm.train.data.rows import ShardIndex

    started = time.perf_counter()
    index = ShardIndex(open_data_set(folder))
    opened = time.perf_counter()
    cursor = Cursor(epoch=EPOCH, rows=row)
    step = next(train_steps(index, share(block_mask=True), seed=1, shuffle=True, cursor=cursor, ahead=True))
    reached = time.perf_counter()
    assert step.start == cursor
    return {"open": opened - started, "seek": reached - opened}


def drop_from_cache(folder: Path) -> None:
    """Make the kernel forget the files, so that they are read from the disk again."""
    for path in folder.rglob("*.parquet"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure_seek(folder: Path, seeks: int) -> dict[str, Any]:
    """The slowest and the median of `seeks` random rows."""
    rows = open_data_set(folder).manifest.rows
    rng = random.Random(2)
    found = []
    for _ in range(seeks):
        drop_from_cache(folder)
        found.append(child("seek", folder, "--row", str(rng.randrange(rows))))
    times = sorted(each["seek"] for each in found)
    opening = sorted(each["open"] for each in found)
    return {
        "benchmark": "stream_seek",
        "ratio": round(times[-1] / SEEK_BAR, 3),
        "bar": SEEK_BAR,
        "met": times[-1] < SEEK_BAR,
        "median_s": round(statistics.median(times), 3),
        "max_s": round(times[-1], 3),
        "open_median_s": round(statistics.median(opening), 3),
        "open_max_s": round(opening[-1], 3),
        "seeks": seeks,
        "rows": rows,
    }


def child(what: str, folder: Path, *arguments: str) -> dict[str, Any]:
    """Run one measurement in a process of its own."""
    command = [sys.executable, __file__, "--child", what, "--folder", str(folder), *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> int:
    """Make the set, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=[*WHATS, "all"], default="all")
    parser.add_argument("--tokens", type=int, default=1 << 30, help="size of the data set")
    parser.add_argument("--pass_tokens", type=int, default=1 << 28, help="how many of them speed and memory read")
    parser.add_argument("--seeks", type=int, default=20, help="random rows to seek")
    parser.add_argument("--scratch", help="where the data set is made [default: the system's temporary folder]")
    parser.add_argument("--child", choices=WHATS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--row", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child == "seek":
        print(json.dumps(seek(arguments.folder, arguments.row)))
        return 0
    if arguments.child:
        measure = measure_speed if arguments.child == "speed" else measure_memory
        print(json.dumps(measure(arguments.folder, arguments.pass_tokens)))
        return 0
    met = True
    with tempfile.TemporaryDirectory(dir=arguments.scratch, prefix="stream-") as scratch:
        folder = Path(scratch) / "packed"
        make_set(folder, arguments.tokens)
        for what in WHATS if arguments.what == "all" else [arguments.what]:
            if what == "seek":
                result = measure_seek(folder, arguments.seeks)
            else:
                result = child(what, folder, "--pass_tokens", str(arguments.pass_tokens))
            met &= result["met"]
            print(json.dumps(result), flush=True)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
