"""What `--split_dlayer` and `--emb_partitions` could gain at most, and so why they are refused.

For published shapes and numbers of stages: how much faster the slowest stage would be if stages could be cut between
attention and mlp (half layers), or if the head's time could be spread over all stages, compared with the best cut
between whole layers. By the cost model, sequence 4096; nothing is charged for the extra traffic, so these are upper
bounds. Prints one JSON line; `ratio` is the best gain of half layers where a stage has at least eight layers.
"""

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from transformers import LlamaConfig, PretrainedConfig, Qwen3Config  # noqa: E402

from jllm.models.pipeline.costs import estimate_costs  # noqa: E402
from jllm.models.pipeline.partition import best_split  # noqa: E402

LENGTH = 4096


def shape(kind: Any, vocab: int, width: int, inner: int, layers: int, heads: int) -> PretrainedConfig:
    config: PretrainedConfig = kind(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
    )
    return config


MODELS = {
    "1.7B": (shape(Qwen3Config, 151_936, 2048, 6144, 28, 16), (2, 4, 8)),
    "8B": (shape(LlamaConfig, 128_256, 4096, 14_336, 32, 32), (2, 4, 8)),
    "14B": (shape(Qwen3Config, 151_936, 5120, 17_408, 40, 40), (2, 4, 8)),
    "32B": (shape(Qwen3Config, 151_936, 5120, 25_600, 64, 64), (4, 8, 16)),
    "70B": (shape(LlamaConfig, 128_256, 8192, 28_672, 80, 64), (4, 8, 16)),
}


def slowest(units: list[float], head: float, stages: int) -> float:
    """Time of the slowest stage of the best cut between `units`."""
    sums = list(itertools.accumulate(units, initial=0.0))

    def cost(first: int, end: int, _: int) -> float:
        return sums[end] - sums[first] + (head if end == len(units) else 0.0)

    bounds = best_split(len(units), stages, cost)
    return max(cost(first, end, 0) for first, end in itertools.pairwise(bounds))


def gains(config: Any, stages: int) -> dict[str, float]:
    """Layers a stage, and the gain in per cent of half layers and of a spread head."""
    costs = estimate_costs(config, sequence_length=LENGTH)
    times = [layer.time for layer in costs.layers]
    heads, size = config.num_attention_heads, config.head_dim
    attention = 2 * config.hidden_size * size * (heads + config.num_key_value_heads) + LENGTH * size * heads
    share = attention / (attention + 3 * config.hidden_size * config.intermediate_size)
    halves = [part for time in times for part in (share * time, (1 - share) * time)]
    whole = slowest(times, costs.head_time, stages)
    percent: Callable[[float], float] = lambda better: round(100 * (whole / better - 1), 1)  # noqa: E731
    return {
        "layers_a_stage": round(len(times) / stages, 1),
        "half_layers": percent(slowest(halves, costs.head_time, stages)),
        "spread_head": percent(slowest([time + costs.head_time / len(times) for time in times], 0.0, stages)),
    }


def main() -> int:
    """Work out, report."""
    table = {f"{name} x{stages}": gains(config, stages) for name, (config, many) in MODELS.items() for stages in many}
    usual = [row["half_layers"] for row in table.values() if row["layers_a_stage"] >= 8]
    print(json.dumps({"benchmark": "half_layers", "ratio": round(1 + max(usual) / 100, 3), "gains_percent": table}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
