"""MLflow's own package, on a folder: numbers, the run that goes on, artefacts."""

import json
from pathlib import Path

import pytest

from tests.train.records.sinks.reporting import NAMES, report


@pytest.mark.parametrize("files", [False, True])
def test_mlflow(tmp_path: Path, files: bool) -> None:
    report(tmp_path, "mlflow", files=files)
    [run] = [path.parent for path in (tmp_path / "mlruns").rglob("tags") if (path / "jllm.run").exists()]
    for name in NAMES:
        lines = (run / "metrics" / name).read_text().splitlines()
        steps = [int(line.split()[2]) for line in lines]
        assert steps == ([1, 2, 3, 3, 4, 5] if name.startswith("train") else [3, 5])
    assert (run / "params/precision").read_text() == "bf16"
    [artefacts] = run.glob("artifacts")
    if files:
        assert (artefacts / "checkpoint/step-00000003/index.json").is_file()
    else:
        told = json.loads((artefacts / "checkpoint/step-00000003.json").read_text())
        assert told == {"step": 3, "folder": str((tmp_path / "ckpt").resolve())}
