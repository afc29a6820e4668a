"""A run that is killed at any moment, and run again, leaves what an uninterrupted run leaves."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jllm.data.packing.documents import Documents
from jllm.data.prepare import conversion
from jllm.data.prepare.conversion import Conversion
from jllm.data.prepare.encoding import Encoded
from jllm.data.prepare.saving.chunk_cache import ChunkCache
from jllm.data.prepare.saving.sink import ResumePoint
from jllm.data.sources import chunks
from jllm.data.sources.chunk import Chunk
from jllm.data.sources.chunks import opened
from jllm.data.sources.inputs import resolve
from tests.data.raw2ids_runs import documents, finished_files, tree, write_jsonl

SIZE = int(os.environ.get("JLLM_TEST_SIZE", "1"))
KILLS = 2 * SIZE
CHUNK = 1 << 14


def start(*arguments: object) -> "subprocess.Popen[bytes]":
    """The command with small chunks, in a process of its own."""
    code = f"from jllm.data.sources import chunks\nchunks.CHUNK_BYTES = {CHUNK}\nfrom jllm.raw2ids import main\nmain()"
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE)


@pytest.mark.parametrize(
    "options",
    [
        ["-t", "pretrain", "--stack", "-n", 2500, "--batch_size", 300, "--max_len", 129],
        ["-t", "pretrain", "--packing", "best_fit", "-n", 2500, "--batch_size", 300, "--max_len", 129],
        ["-t", "pretrain", "--stack", "-n", 2500, "--batch_size", 300, "--max_len", 129, "--eval_fraction", 0.1],
    ],
    ids=["stack", "best_fit", "held_out"],
)
def test_killed_and_run_again(tmp_path: Path, byte_tokenizer: Path, options: list[object]) -> None:
    source = write_jsonl(tmp_path / "some.jsonl", documents(6000, seed=5))
    arguments = ["-i", source, "--tokenizer", byte_tokenizer, *options, "--quiet"]
    for name in ("first", "whole"):  # the first one loads the tokenizer, which takes longer than all the rest
        begun = time.monotonic()
        whole = start(*arguments, "-o", tmp_path / name / "out")
        assert whole.wait(timeout=100) == 0
        duration = time.monotonic() - begun
    out = tmp_path / "killed"  # around all folders that the command writes
    moments = random.Random(7)
    kept: dict[Path, int] = {}
    kills = 0
    for _ in range(KILLS):
        process = start(*arguments, "-o", out / "out", "--cores", moments.randint(1, 3))
        time.sleep(duration * moments.uniform(0.4, 1.0))
        killed = process.poll() is None
        kills += killed
        process.send_signal(signal.SIGKILL)
        process.wait()
        if not killed:  # it was done: begin anew, so that there is something to kill
            assert tree(out) == tree(tmp_path / "whole")
            shutil.rmtree(out)
            kept = {}
            continue
        now = finished_files(out)
        assert all(now[path] == inode for path, inode in kept.items()), "a finished file was written again"
        kept = now
    last = start(*arguments, "-o", out / "out")
    assert last.wait(timeout=100) == 0
    assert tree(out) == tree(tmp_path / "whole")
    now = finished_files(out)
    assert all(now[path] == inode for path, inode in kept.items())
    assert kills or SIZE == 1


@pytest.mark.parametrize("options", [["--stack"], ["--packing", "best_fit"], []], ids=["stack", "best_fit", "windows"])
def test_stopped_at_every_block(
    tmp_path: Path, byte_tokenizer: Path, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same without chance: stop after each block in turn, and encode no block twice but those in flight."""
    from jllm.data.prepare.config import Raw2IdsConfig
    from jllm.data.prepare.run import prepare
    from jllm.data.prepare.saving.chunk_cache import ChunkCache, Place
    from jllm.data.sources import chunks

    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1 << 12)
    source = write_jsonl(tmp_path / "some.jsonl", documents(500, seed=6))
    values: dict[str, Any] = {
        "input": (str(source),),
        "tokenizer": str(byte_tokenizer),
        "type": "pretrain",
        "max_len": 65,
        "cores": 2,
        "threads": True,
    }
    values |= {"num": 220, "batch_size": 30, "stack": "--stack" in options, "quiet": True}
    values |= {"packing": "best_fit" if "best_fit" in options else "none"}
    prepare(Raw2IdsConfig(**values, output=tmp_path / "whole"))

    class StopError(Exception):
        pass

    encoded: list[Place] = []
    save = ChunkCache.save

    def counted(self: ChunkCache, place: Place, *arguments: Any) -> Any:
        encoded.append(place)
        return save(self, place, *arguments)

    monkeypatch.setattr(ChunkCache, "save", counted)
    show = "jllm.data.prepare.reporting.progress.Progress.show"
    stops = 0
    while True:
        fed = []

        def watch(*_: object, fed: list[int] = fed, limit: int = 2 + stops) -> None:
            fed.append(1)
            if len(fed) > limit:
                raise StopError

        monkeypatch.setattr(show, watch)
        try:
            prepare(Raw2IdsConfig(**values, output=tmp_path / "stopped"))
            break
        except StopError:
            stops += 1
            assert stops < 200
            time.sleep(0.02)
    assert stops > 3
    assert tree(tmp_path / "stopped") == tree(tmp_path / "whole")
    assert len(encoded) == len(set(encoded)), "a saved block was encoded again"


@pytest.mark.parametrize("saved", [[], [0], [0, 1], [1], [0, 2], [0, 1, 2, 3]], ids=str)
@pytest.mark.parametrize("first", [0, 1])
def test_a_source_is_read_from_the_first_chunk_that_was_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: list[int], first: int
) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1 << 8)
    (source,) = resolve([str(write_jsonl(tmp_path / "a.jsonl", ["x" * 150] * 6))])
    whole = list(chunks.read_chunks(source, 0))
    assert len(whole) == 6
    nothing = Documents(ids=np.empty(0, np.int32), offsets=np.zeros(1, np.int64))
    for number in saved:
        encoded = Encoded(
            documents=nothing, bad=[], counts={"number": number}, end=whole[number].end,
            end_line=whole[number].end_line - whole[number].line + 1,
        )  # fmt: skip
        ChunkCache(tmp_path, vocab_size=5, sinks=["main"]).save((0, number), encoded)
    begun: list[int] = []
    read_chunks = conversion.read_chunks

    def read(*arguments: Any, **named: Any) -> Iterator[Any]:
        begun.append(named["index"])
        return read_chunks(*arguments, **named)

    monkeypatch.setattr(conversion, "read_chunks", read)
    run = Conversion(
        sources=[source], columns=[None], cache=ChunkCache(tmp_path, vocab_size=5, sinks=["main"]), cores=1,
        work=None,  # type: ignore[arg-type]
    )  # fmt: skip
    point = ResumePoint(chunk=first, start=whole[first].end - len(whole[first].data), line=whole[first].line)
    items = list(conversion._saved_and_read(run, point, 0))
    gap = next(number for number in range(first, 7) if number not in saved)
    assert begun == [gap]
    found = [item.index if isinstance(item, Chunk) else item[0].counts["number"] for item in items]
    assert found == list(range(first, 6))
    planned = [item for item in items if isinstance(item, Chunk)]
    assert [item.index for item in planned] == [number for number in range(first, 6) if number not in saved]
    assert [opened(item, "jsonl", 1 << 20).data for item in planned] == [whole[item.index].data for item in planned]
