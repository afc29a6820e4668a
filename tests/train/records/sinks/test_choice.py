"""Services are chosen by name, and nothing is imported for those that are not asked for."""

import subprocess
import sys
from pathlib import Path

from jllm.train.records.sinks.choice import _SERVICES
from jllm.train.records.sinks.names import SERVICES
from tests.train.records.sinks.reporting import RUN


def test_every_service_can_be_chosen() -> None:
    assert tuple(sorted(_SERVICES)) == SERVICES
    assert all(_SERVICES[name].name == name for name in SERVICES)  # type: ignore[attr-defined]


def test_nothing_is_imported_when_nothing_is_asked_for(tmp_path: Path) -> None:
    code = RUN + "\nprint([name for name in ('wandb', 'mlflow', 'trackio') if name in sys.modules])"
    command = [sys.executable, "-c", code, str(tmp_path), "", "1", "places"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
    assert done.stdout.splitlines()[-1] == "[]"
