"""The kernel adds what PyTorch adds; run by Triton's interpreter, in a process of its own."""

import importlib.util
import os
import subprocess
import sys

import pytest

CHECK = """
import torch
from jllm.train.distributed.gradient_sum import add

for count in (1, 100, 4096, 4097, 20_000):
    total, share = torch.randn(count), torch.randn(count).bfloat16()
    expected = total.clone().add_(share)
    add(total, share)
    assert torch.equal(total, expected), count
print("equal")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed: it comes with CUDA")
def test_the_same_sums() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    found = subprocess.run([sys.executable, "-c", CHECK], env=environment, capture_output=True, text=True, check=False)
    assert found.stdout == "equal\n", found.stderr
