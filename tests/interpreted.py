"""Kernels for GPUs run by Triton's interpreter, which has to be chosen before Triton is imported."""

import importlib.util
import os
import subprocess
import sys

import pytest

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: it comes with CUDA"
)


# NumPy 2.4 takes no arrays of one element for numbers; the interpreter keeps its numbers in such.
_NUMBERS = """
from triton.runtime import interpreter

_patch = interpreter._patch_lang_tensor


def _patch_numbers_too(tensor, scope):
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_numbers_too
"""


def assert_says_equal(code: str) -> None:
    """Run code that prints "equal" at its end, in a process of its own."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    found = subprocess.run(
        [sys.executable, "-c", _NUMBERS + code], env=environment, capture_output=True, text=True, check=False
    )
    assert found.stdout == "equal\n", found.stderr
