"""A run that is killed at any moment, and run again, leaves what an uninterrupted run leaves."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.chats import END_OUTSIDE
from tests.data.raw2ids_runs import documents, raw2ids, tree, write_jsonl

SIZE = int(os.environ.get("JLLM_TEST_SIZE", "1"))
KILLS = 2 * SIZE
CHUNK = 1 << 14


def start(*arguments: object) -> "subprocess.Popen[bytes]":
    """The command with small chunks, in a process of its own."""
    code = f"from jllm.data.sources import chunks\nchunks.CHUNK_BYTES = {CHUNK}\nfrom jllm.raw2ids import main\nmain()"
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE)


def finished_files(out: Path) -> dict[Path, int]:
    return {path: path.stat().st_ino for path in out.rglob("*.parquet") if ".raw2ids" not in path.parts}


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
    from jllm.data.prepare.chunk_cache import ChunkCache, Place
    from jllm.data.prepare.config import Raw2IdsConfig
    from jllm.data.prepare.run import prepare
    from jllm.data.sources import chunks

    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1 << 12)
    source = write_jsonl(tmp_path / "some.jsonl", documents(500, seed=6))
    values: dict[str, Any] = {
        "input": (str(source),),
        "tokenizer": str(byte_tokenizer),
        "type": "pretrain",
        "max_len": 65,
        "cores": 2,
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
    show = "jllm.data.prepare.progress.Progress.show"
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


def test_a_full_disk_is_one_line(tmp_path: Path, byte_tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jllm.data.prepare import sink
    from jllm.data.prepare.config import Raw2IdsConfig
    from jllm.data.prepare.run import prepare
    from jllm.errors import UserError

    source = write_jsonl(tmp_path / "some.jsonl", documents(300))
    config = Raw2IdsConfig(
        input=(str(source),), tokenizer=str(byte_tokenizer), type="pretrain", stack=True, max_len=65, num=100,
        output=tmp_path / "out", quiet=True,
    )  # fmt: skip
    write = sink.ShardWriter.write

    def full(self: sink.ShardWriter, batch: object) -> None:
        if self.path.name.startswith("some-00001"):
            raise OSError(28, "No space left on device")
        write(self, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(sink.ShardWriter, "write", full)
    with pytest.raises(UserError, match="disk is full"):
        prepare(config)
    assert len(finished_files(tmp_path / "out")) == 1
    monkeypatch.setattr(sink.ShardWriter, "write", write)
    kept = finished_files(tmp_path / "out")
    prepare(config)
    assert kept.items() <= finished_files(tmp_path / "out").items()


def test_bad_records_are_counted_and_refused(tmp_path: Path, byte_tokenizer: Path) -> None:
    lines = [json.dumps({"text": text}) for text in documents(100)]
    lines[20:31] = ["{bad"] * 11
    source = tmp_path / "some.jsonl"
    source.write_text("\n".join(lines))
    arguments = ["-i", source, "-o", tmp_path / "out", "--tokenizer", byte_tokenizer, "-t", "pretrain", "--stack"]
    refused = raw2ids(*arguments, check=False)
    assert refused.returncode == 2
    assert re.search(r"11 of 100 records.*some\.jsonl:21", refused.stderr)
    stopped = raw2ids(*arguments, "--on_error", "stop", "-C", check=False)
    assert stopped.returncode == 2
    assert "some.jsonl:21" in stopped.stderr
    raw2ids(*arguments, "--on_error", "skip")
    manifest = json.loads((tmp_path / "out" / "_manifest.json").read_text())
    assert manifest["documents"] == 89
    assert manifest["bad_records"]["bad JSON"]["count"] == 11
    assert len(manifest["bad_records"]["bad JSON"]["examples"]) == 5


def test_a_second_run_waits_its_turn(tmp_path: Path, byte_tokenizer: Path) -> None:
    from jllm.data.prepare.workplace import Workplace
    from jllm.errors import UserError

    second = Workplace(tmp_path / "out").locked()
    with Workplace(tmp_path / "out").locked(), pytest.raises(UserError, match="another run"):
        second.__enter__()


def test_chat_from_the_command_line(tmp_path: Path, byte_tokenizer: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [[{"user": f"q{i}"}, {"assistant": " ".join(["word"] * int(rng.integers(1, 60)))}] for i in range(200)]
    source = tmp_path / "chat.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["-i", source, "--tokenizer", byte_tokenizer, "--chat_template", "chatml", "--max_len", 48]
    for cores in (1, 2):
        raw2ids(*arguments, "-o", tmp_path / str(cores), "--cores", cores)
    assert tree(tmp_path / "1") == tree(tmp_path / "2")
    result = raw2ids(*arguments, "-o", tmp_path / "packed", "--packing", "best_fit", "--pad", "--debug", 2)
    assert result.stdout.count("--- row") == 2
    plain, packed = (json.loads((tmp_path / name / "_manifest.json").read_text()) for name in ("1", "packed"))
    assert plain["trained_tokens"] == packed["trained_tokens"]
    assert packed["rows"] < plain["rows"]
    assert plain["chat"]["warnings"] == []
    outside = tmp_path / "outside.jinja"
    outside.write_text(END_OUTSIDE)
    warned = raw2ids(*arguments, "--chat_template", outside, "-o", tmp_path / "outside")
    assert warned.stderr.count("warning: ") == 1
    noted = json.loads((tmp_path / "outside" / "_manifest.json").read_text())
    assert "<|im_end|>" in noted["chat"]["warnings"][0]
    missing = raw2ids("-i", source, "--tokenizer", byte_tokenizer, "-o", tmp_path / "no", check=False)
    assert missing.returncode == 2
    assert "--chat_template" in missing.stderr
