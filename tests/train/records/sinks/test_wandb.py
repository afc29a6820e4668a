"""The package of Weights & Biases, offline: numbers, the run that goes on, artefacts."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.train.records.sinks.reporting import RUN, report


def test_nobody_is_asked_for_a_key(tmp_path: Path) -> None:
    """Without one that is a warning, once, and the run goes on."""
    pytest.importorskip("wandb", reason='wandb is not installed: pip install "jllm[report]"')
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    environment |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}
    command = [sys.executable, "-c", RUN, str(tmp_path), "wandb", "1", "places"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=150, check=True)
    assert done.stdout.count("warning: --report_to wandb: ConnectionError: not logged in") == 1
    events = [json.loads(line) for line in (tmp_path / "log/metrics.jsonl").read_text().splitlines()]
    warnings = [event["message"] for event in events if event.get("event") == "warning"]
    assert len(warnings) == 2
    assert warnings[1].endswith("records did not get there in time")


def log_entries(log: bytes) -> Iterator[bytes]:
    """The entries of a log as LevelDB writes it: blocks of 32 KiB of pieces, each with checksum, length and kind."""
    at, entry = 7, b""  # after the file's own header
    while at + 7 <= len(log):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", log, at)
        entry += log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield entry
            entry = b""


@pytest.mark.parametrize("files", [False, True])
def test_wandb(tmp_path: Path, files: bool) -> None:
    """Offline: each start leaves a file that `wandb sync` sends; both are of one run."""
    report(tmp_path, "wandb", files=files)
    from wandb.proto import wandb_internal_pb2

    logs = sorted((tmp_path / "log/wandb").glob("offline-run-*/*.wandb"))
    assert len(logs) == 2
    losses, artefacts = [], []
    for log in logs:
        for data in log_entries(log.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                assert record.run.run_id == "0123456789abcdef"
            values = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            if "train/loss" in values:
                losses.append((int(values["step"]), float(values["train/loss"])))
            if record.WhichOneof("record_type") == "artifact" or record.request.HasField("log_artifact"):
                artefacts.append(record)
    assert losses == [(step, pytest.approx(1 / step)) for step in (1, 2, 3, 3, 4, 5)]
    assert artefacts
