"""Slices of stages, through DeepSpeed: losses, norms and weights of one plain transformers process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jllm.models.families import TENSOR_PARALLEL
from tests.distributed.ranks import Ranks
from tests.distributed.reference import batches_in_order, train_reference
from tests.distributed.runs import records, train_rank
from tests.fixtures import VOCABULARY, random_rows, write_rows
from tests.models.family_check import make_folder
from tests.models.tiny import tiny_config

STEPS = 5
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"processes": 2, "model_parallel_size": 2},
    "pp2xtp2": {"processes": 4, "model_parallel_size": 2, "pipe_parallel_size": 2},
    "pp2xtp2, by stage": {
        "processes": 4,
        "model_parallel_size": 2,
        "pipe_parallel_size": 2,
        "column_major_topology": False,
        "checkpoint_grad_interval": 1,
        "schedule": "overlapped",
    },
    "tp2xdp2": {"processes": 4, "model_parallel_size": 2},
    "tp2xdp2, ZeRO-1": {"processes": 4, "model_parallel_size": 2, "zero_stage": 1},
    "tp4": {"processes": 4, "model_parallel_size": 4},
}


def train_ranks(runs: list[dict[str, Any]]) -> list[str | None]:
    """One rank of several runs, one after the other, in one process group."""
    return [train_rank(options) for options in runs]


@pytest.mark.parametrize("family", TENSOR_PARALLEL)
def test_equals_one_process(ranks: Callable[[int], Ranks], tmp_path: Path, family: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = tmp_path / "model"
    make_folder(tiny_config(family, tied=family in ("gemma2", "qwen3"), vocab_size=VOCABULARY), model)
    data = write_rows(tmp_path / "data", random_rows(12, labels=True, packed=True), files=2)
    options = {"optimizer": "sgd", "learning_rate": 0.02, "gradient_clipping": 0.7, "seed": 7}
    names = [name for name in LAYOUTS if name != "tp4" or family in ("llama", "qwen3")]
    for count in (2, 4):
        runs = []
        for name in names:
            layout = dict(LAYOUTS[name])
            if layout["processes"] != count:
                continue
            data_size = count // layout["model_parallel_size"] // layout.get("pipe_parallel_size", 1)
            runs.append(
                {
                    **options,
                    **layout,
                    "model": model,
                    "train_data": (str(data),),
                    "precision": "fp32",
                    "gradient_accumulation_steps": 2 // data_size,
                    "per_device_train_batch_size": 2,
                    "max_steps": STEPS,
                    "lr_scheduler_type": "constant",
                    "output_dir": tmp_path / name,
                    "partition_method": "uniform",
                }
            )
        assert ranks(count).run(train_ranks, runs) == [[None] * len(runs)] * count
    losses, norms, weights = train_reference(
        model, batches_in_order(data, steps=STEPS, global_batch=4, seed=7), options=options
    )
    for name in names:
        found = records(tmp_path / name / "log")
        np.testing.assert_allclose([record["loss"] for record in found], losses, atol=1e-5, err_msg=name)
        np.testing.assert_allclose([record["grad_norm"] for record in found], norms, rtol=1e-4, err_msg=name)
        trained = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).state_dict()
        for key, tensor in trained.items():
            torch.testing.assert_close(tensor, weights[key], atol=1e-5, rtol=0, msg=lambda m, w=(name, key): f"{w}: {m}")
