"""Kernels for GPUs run by Triton's interpreter, which has to be chosen before Triton is imported."""

import importlib.util
import os
import subprocess
import sys

import pytest

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: it comes with CUDA"
)


def assert_says_equal(code: str) -> None:
    """Run code that prints "equal" at its end, in a process of its own."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert found.stdout == "equal\n", found.stderr
