"""Runs that report to real packages of services in their local modes."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RUN = """
import sys
from pathlib import Path
from jllm.train.config import TrainConfig
from jllm.train.records.metrics import Recorder
from jllm.train.records.sinks.choice import reporters_of
folder, service, first, files = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4] == "files"
config = TrainConfig(model=Path("m"), train_data=("d",), log_dir=folder / "log", report_to=service, report_files=files)
recorder = Recorder(config.resolved_log_dir, enabled=True, total_steps=9, first_step=first, steps_per_print=1,
                    reporters=reporters_of(config, "0123456789abcdef"))
for step in range(first, first + 3):
    recorder.train(dict(step=step, epoch=0.1, loss=1 / step, lr=1e-5, grad_norm=0.5, mfu=None, tokens_per_second=1.0,
                        data_wait=0.0, memory_mib=[1, 2], seconds=1.0))
recorder.evaluation(dict(step=step, name="held out", eval_loss=2.0, perplexity=7.4, accuracy=0.5, eval_tokens=10,
                         seconds=1))
recorder.artefact("checkpoint", folder / "ckpt", step=step)
recorder.close()
"""
NAMES = ("train/loss", "train/memory_mib/1", "eval/held out/loss")


def report(folder: Path, service: str, *, files: bool = False) -> str:
    """A run of steps 1 to 3, and a second start that makes step 3 again and goes on to step 5."""
    if importlib.util.find_spec(service) is None:
        pytest.skip(f'{service} is not installed: pip install "jllm[report]"')
    (folder / "ckpt").mkdir()
    (folder / "ckpt/index.json").write_text("{}")
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_DIR": str(folder), "HOME": str(folder)}
    environment |= {"MLFLOW_TRACKING_URI": str(folder / "mlruns"), "MLFLOW_ALLOW_FILE_STORE": "true"}
    environment |= {"TRACKIO_DIR": str(folder / "trackio"), "HF_HUB_OFFLINE": "1", "GIT_PYTHON_REFRESH": "quiet"}
    said = ""
    for first in ("1", "3"):
        command = [sys.executable, "-c", RUN, str(folder), service, first, "files" if files else "places"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=150, cwd=folder)
        assert done.returncode == 0, done.stderr
        said += done.stdout
    assert "warning" not in said, said
    records = [json.loads(line) for line in (folder / "log/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 3, 4, 5]
    return said
