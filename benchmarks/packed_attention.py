"""Packed rows on a GPU: attention by document lengths against a block mask, and against plain causal attention.

Checks first (bf16, forward and backward, against fp32 with a block mask): grouped heads, a sliding window, values
narrower than keys; that a Llama's loss agrees; and that no layer waits for the device. Then times one attention,
forward and backward, 32 heads of 128 over 8 key heads, sequence 8192, documents of about 1000 tokens; and our kernel
beside PyTorch's attention by lengths, in turn, for sizes and numbers of heads and lengths of documents. Needs CUDA.
Prints one JSON line; `ratio` is block mask / document lengths in time, `kernels` the times of PyTorch's and of ours.
"""

import itertools
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from jllm.models.attention import VARLEN, packing, varlen_attention  # noqa: E402
from jllm.models.kernels import available as kernels  # noqa: E402
from jllm.models.pipeline.span import StageSpan  # noqa: E402
from jllm.models.weights.loading import init_stage  # noqa: E402

DEVICE = "cuda"


def documents(batch: int, length: int, size: int) -> Tensor:
    """Position ids of documents of about `size` tokens."""
    generator = torch.Generator().manual_seed(0)
    positions = torch.arange(length).repeat(batch, 1)
    for row in range(batch):
        start = 0
        while start < length:
            positions[row, start:] = torch.arange(length - start)
            start += int(torch.randint(size // 2, 3 * size // 2, (1,), generator=generator))
    return positions.to(DEVICE)


def block_mask(positions: Tensor, window: int | None) -> Tensor:
    """[B, 1, S, S] of what may be seen."""
    index = torch.arange(positions.shape[1], device=DEVICE)
    start = index - positions
    distance = index[:, None] - index[None, :]
    mask = (start[:, :, None] == start[:, None, :]) & (distance >= 0)
    return (mask & (distance < window) if window else mask)[:, None]


def bounds_of(positions: Tensor) -> dict[str, Any]:
    class Holder:
        class config:  # noqa: N801
            _attn_implementation = VARLEN

    return packing(Holder(), positions)  # type: ignore[arg-type]


def masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


def check(heads: int, key_heads: int, size: int, narrow: int, window: int | None) -> float:
    """Largest error of output and gradients, relative to the largest value."""
    torch.manual_seed(0)
    positions = documents(2, 512, 100)
    shapes = [(2, heads, 512, size), (2, key_heads, 512, size), (2, key_heads, 512, narrow)]
    exact = [torch.randn(shape, device=DEVICE).bfloat16().float().requires_grad_() for shape in shapes]
    rounded = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
    expected = masked(exact[0], exact[1], exact[2], block_mask(positions, window))
    arguments: dict[str, Any] = {"sliding_window": window, **bounds_of(positions)}
    found, _ = varlen_attention(torch.nn.Identity(), rounded[0], rounded[1], rounded[2], None, **arguments)
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    (found.float() * weight).sum().backward()
    pairs: list[tuple[Tensor, Tensor]] = [(found.float(), expected)]
    for ours, theirs in zip(rounded, exact, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        pairs.append((ours.grad.float(), theirs.grad))
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def model_check() -> tuple[float, bool]:
    """(loss difference between the two ways, whether layers run without waiting for the device)."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    span = StageSpan(index=0, count=1, first_layer=0, end_layer=4)
    positions = documents(2, 1024, 200)
    ids = torch.randint(0, 1000, (2, 1024), device=DEVICE)
    losses, is_free = [], True
    for implementation in (VARLEN, "sdpa"):
        model = init_stage(
            config, span, dtype=torch.bfloat16, seed=0, device=DEVICE, attn_implementation=implementation
        )
        arguments = packing(model, positions)
        for attempt in range(2):
            if implementation == VARLEN and attempt:
                torch.cuda.set_sync_debug_mode("error")
            try:
                logits = model(input_ids=ids, position_ids=positions, use_cache=False, **arguments).logits
            except RuntimeError:
                is_free = False
            torch.cuda.set_sync_debug_mode("default")
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids.flatten()).item())
    return abs(losses[0] - losses[1]), is_free


def milliseconds(run: Any) -> float:
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(10):
        run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 10


def both_kernels(heads: int, key_heads: int, size: int, mean: int | None) -> dict[str, Any]:
    """Forward and backward of 4 rows of 4,096 tokens: milliseconds of PyTorch's and of our kernel, medians of 5."""
    positions = documents(4, 4096, mean) if mean else torch.arange(4096, device=DEVICE).repeat(4, 1)
    is_start = positions.flatten() == 0
    bounds = torch.nn.functional.pad(is_start.nonzero()[:, 0], (0, 1), value=len(is_start)).to(torch.int32)
    longest = int(bounds.diff().max())
    query, key, value = given = [
        torch.randn(len(is_start), count, size, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        for count in (heads, key_heads, key_heads)
    ]
    slope = torch.randn_like(query)
    ours = kernels.packed_attention

    def run() -> None:
        torch.autograd.grad(kernels.by_lengths(query, key, value, bounds, longest, None, None), given, slope)

    times: dict[str, list[float]] = {"varlen": [], "ours": []}
    for _ in range(5):
        for name, module in (("varlen", None), ("ours", ours)):
            kernels.packed_attention = module
            times[name].append(milliseconds(run))
    found = {name: round(statistics.median(each), 3) for name, each in times.items()}
    return {
        "heads": f"{heads} over {key_heads} of {size}",
        "mean_document": mean or "whole rows",
        **found,
        "ratio": round(found["varlen"] / found["ours"], 2),
    }


def main() -> int:
    """Check, time, report."""
    if not torch.cuda.is_available():
        print(json.dumps({"benchmark": "packed_attention", "skipped": "needs CUDA"}))
        return 0
    errors = {
        "heads": check(8, 8, 64, 64, None),
        "grouped": check(8, 2, 128, 128, None),
        "odd_groups": check(14, 2, 64, 64, None),
        "window": check(8, 2, 64, 64, 32),
        "wide_window": check(12, 4, 128, 128, 300),
        "narrow_values": check(8, 8, 192, 128, None),
    }
    difference, is_free = model_check()
    length = 8192
    positions = documents(1, length, 1000)
    query = torch.randn(1, 32, length, 128, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    key, value = (
        torch.randn(1, 8, length, 128, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for _ in range(2)
    )
    mask, arguments, module = block_mask(positions, None), bounds_of(positions), torch.nn.Identity()
    ways = {
        "document_lengths": lambda: varlen_attention(module, query, key, value, None, **arguments)[0],
        "plain_causal": lambda: varlen_attention(module, query, key, value, None)[0],
        "block_mask": lambda: masked(query, key, value, mask),
    }
    times = {}
    for name, way in ways.items():
        output = way()
        gradient = torch.randn_like(output)
        times[name] = round(milliseconds(lambda way=way, gradient=gradient: way().backward(gradient)), 3)
    report = {
        "benchmark": "packed_attention",
        "ratio": round(times["block_mask"] / times["document_lengths"], 2),
        "milliseconds": times,
        "kernels": [
            both_kernels(*shape, mean)
            for shape, mean in itertools.product(
                [(32, 8, 64), (32, 8, 128), (32, 32, 128), (14, 2, 64)], [100, 500, 2000, None]
            )
        ],
        "relative_errors": {name: round(error, 5) for name, error in errors.items()},
        "loss_difference": difference,
        "layers_never_wait": is_free,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }
    print(json.dumps(report))
    return 0 if max(errors.values()) < 0.03 and difference < 0.01 and is_free else 1


if __name__ == "__main__":
    sys.exit(main())
