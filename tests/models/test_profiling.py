"""Measured times: they see what costs more, are kept, and drive the split."""

from pathlib import Path

import torch

from jllm.models.costs import estimate_costs
from jllm.models.partition import partition
from jllm.models.profiling import measure_costs
from tests.models.tiny import tiny_config

torch.set_num_threads(1)


def test_measured_split(tmp_path: Path) -> None:
    config = tiny_config("llama", num_hidden_layers=8, vocab_size=30_000)
    costs = estimate_costs(config, sequence_length=64, dtype=torch.float32)
    options = {"sequence_length": 64, "dtype": torch.float32, "cache": tmp_path}
    measured = measure_costs(config, costs, **options)
    assert measured.is_measured
    assert len(list(tmp_path.glob("*.json"))) == 1
    assert measured.head_time > measured.layers[0].time > 0
    bounds = partition("profile", config=config, num_stages=2, costs=measured)
    assert bounds[1] > 4
    assert measure_costs(config, costs, **options) == measured
