"""The kernel adds what PyTorch adds; run by Triton's interpreter, in a process of its own."""

from tests.interpreted import assert_says_equal, needs_triton

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


@needs_triton
def test_the_same_sums() -> None:
    assert_says_equal(CHECK)
