"""The real model that several tests need: converting it takes a while, so it is done once.

Tests run on all cores at a time, so none of them takes several: threads that wait for each other on cores that are busy
make small products a hundred times slower.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch
ROOT = Path(__file__).resolve().parent.parent
GGUF = "gguf/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def real_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder, by `tools/gguf2hf.py`. Tests must not change it."""
    assets = Path(os.environ.get("JLLM_ASSETS") or Path.home() / ".cache" / "jllm-assets")
    if not (assets / GGUF).is_file():
        pytest.skip(f"{assets / GGUF} is not there; bring it with: make assets")
    folder = tmp_path_factory.mktemp("real") / "model"
    command = [sys.executable, ROOT / "tools" / "gguf2hf.py", "-i", assets / GGUF, "-o", folder]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert result.returncode == 0, result.stderr
    return folder
