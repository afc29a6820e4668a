"""Head and cross-entropy on a GPU: the fused objective beside logits in chunks, Liger and cut-cross-entropy.

Forward and backward pass with gradients of hidden states and weight, bf16, for some (tokens, width, vocabulary), and
for the fused one with several sizes of chunk. Prints one JSON line a shape: milliseconds (medians), peak memory beside
the inputs in MiB, and `ratio`, the best other / ours. Other packages that are not installed are left out. Without a
CUDA device it says "skipped".
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from jllm.models.pipeline import head as heads  # noqa: E402
from jllm.models.pipeline.bundle import LABELS  # noqa: E402
from jllm.models.pipeline.head import Head, PlainHead  # noqa: E402
from jllm.train.objectives.cross_entropy import CrossEntropy  # noqa: E402

SHAPES = ((8192, 4096, 128_256), (16384, 2048, 128_256), (8192, 2048, 32_000))
CHUNKS = (2**25, 2**26, 2**27)
ROUNDS = 7


class LinearHead(Head):
    """A product and nothing else."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.out_features, PlainHead(name="lm_head", linear=linear))
        self._linear = linear

    def before(self, hidden: Tensor) -> Tensor:
        """Its input."""
        return hidden

    def __call__(self, hidden: Tensor) -> Tensor:
        """The logits."""
        logits: Tensor = self._linear(hidden)
        return logits


def measured(run: Callable[[], Tensor], cleared: list[Any]) -> tuple[float, float]:
    """(milliseconds, MiB) of a forward and a backward pass."""
    times = []
    for _ in range(ROUNDS + 2):
        for each in cleared:
            each.grad = None
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run().backward()  # type: ignore[no-untyped-call]
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
        peak = (torch.cuda.max_memory_allocated() - held) / 2**20
    return round(statistics.median(times[2:]), 2), round(peak, 1)


def compared(tokens: int, width: int, vocabulary: int) -> dict[str, Any]:
    """All of them on one shape."""
    torch.manual_seed(0)
    hidden = torch.randn(1, tokens, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    linear = nn.Linear(width, vocabulary, bias=False, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(0, vocabulary, (1, tokens), device="cuda")
    found: dict[str, tuple[float, float]] = {}
    head, fields = LinearHead(linear), {LABELS: labels}
    chunk = heads.CHUNK_ELEMENTS
    fused = CrossEntropy(is_fused=True)
    for size in CHUNKS:
        heads.CHUNK_ELEMENTS = size
        found[f"fused {8 * size >> 20} MiB"] = measured(
            lambda: fused(hidden, head, fields).loss, [hidden, linear.weight]
        )
    heads.CHUNK_ELEMENTS = chunk
    chunked = CrossEntropy(is_fused=False)
    found["in chunks"] = measured(lambda: chunked(hidden, head, fields).loss, [hidden, linear.weight])
    others: dict[str, Callable[[], Tensor]] = {}
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        others["Liger"] = lambda: liger(linear.weight, hidden[0], labels[0])
    except ImportError:
        pass
    try:
        from cut_cross_entropy import linear_cross_entropy

        others["cut-cross-entropy"] = lambda: linear_cross_entropy(hidden[0], linear.weight, labels[0], reduction="sum")
    except ImportError:
        pass
    for name, run in others.items():
        found[name] = measured(run, [hidden, linear.weight])
    ours = found[f"fused {8 * chunk >> 20} MiB"][0]
    best = min(found[name][0] for name in others) if others else None
    return {
        "benchmark": "fused_loss",
        "device": torch.cuda.get_device_name(),
        "shape": [tokens, width, vocabulary],
        **{name: {"ms": ms, "mib": mib} for name, (ms, mib) in found.items()},
        "ratio": round(best / ours, 3) if best is not None else None,
    }


def main() -> None:
    """Measure, and print a line for each shape."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if not torch.cuda.is_available():
        print(json.dumps({"benchmark": "fused_loss", "skipped": "no CUDA device"}))
        return
    for shape in SHAPES:
        print(json.dumps(compared(*shape)), flush=True)


if __name__ == "__main__":
    main()
