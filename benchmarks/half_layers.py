"""What `--split_dlayer` gains on the cost model, and what `--emb_partitions` could gain at most.

For published shapes and numbers of stages: how much faster the slowest stage is where stages may be cut between
attention and mlp (half layers), or would be if the head's time could be spread over all stages, compared with the best
cut between whole layers. Sequence 4096; nothing is charged for the cut, nor for the traffic of a spread head. Prints
one JSON line; `ratio` is the best gain of half layers where a stage has at least eight layers.
"""

import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from transformers import AutoConfig  # noqa: E402

from jllm.models.pipeline.costs import Costs, estimate_costs  # noqa: E402
from jllm.models.pipeline.partition import partition  # noqa: E402
from jllm.train.planning.published import PUBLISHED  # noqa: E402

LENGTH = 4096


MODELS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "1.7B": (PUBLISHED["qwen3-1.7b"], (2, 4, 8)),
    "8B": (PUBLISHED["llama-3-8b"], (2, 4, 8)),
    "8B with 256,000 words": ({**PUBLISHED["llama-3-8b"], "vocab_size": 256_000}, (2, 4, 8)),
    "14B": (PUBLISHED["qwen3-14b"], (2, 4, 8)),
    "32B": (PUBLISHED["qwen3-32b"], (4, 8, 16)),
    "70B": (PUBLISHED["llama-3-70b"], (4, 8, 16)),
}


def slowest(config: Any, costs: Costs, stages: int) -> float:
    """Time of the slowest stage of the best cut."""
    bounds = partition("fast", config=config, num_stages=stages, costs=costs)
    return max(itertools.starmap(costs.time, itertools.pairwise(bounds)))


def gains(config: Any, stages: int) -> dict[str, float]:
    """Layers a stage, and the gain in per cent of half layers and of a spread head."""
    costs = estimate_costs(config, sequence_length=LENGTH)
    halves = estimate_costs(config, sequence_length=LENGTH, in_halves=True)
    share = costs.head_time / len(costs.layers)
    spread = replace(
        costs, head_time=0.0, layers=tuple(replace(layer, time=layer.time + share) for layer in costs.layers)
    )
    whole = slowest(config, costs, stages)
    percent: Callable[[float], float] = lambda better: round(100 * (whole / better - 1), 1)  # noqa: E731
    return {
        "layers_a_stage": round(len(costs.layers) / stages, 1),
        "half_layers": percent(slowest(config, halves, stages)),
        "spread_head": percent(slowest(config, spread, stages)),
    }


def main() -> int:
    """Work out, report."""
    table = {
        f"{name} x{stages}": gains(AutoConfig.for_model(**shape), stages)
        for name, (shape, many) in MODELS.items()
        for stages in many
    }
    usual = [row["half_layers"] for row in table.values() if row["layers_a_stage"] >= 8]
    print(json.dumps({"benchmark": "half_layers", "ratio": round(1 + max(usual) / 100, 3), "gains_percent": table}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
