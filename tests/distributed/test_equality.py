"""A pipeline computes what one plain transformers process computes: losses, gradient norms, weights."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.distributed.ranks import Ranks
from tests.distributed.reference import batches_in_order, train_reference
from tests.distributed.runs import records, train_rank
from tests.fixtures import random_rows, tiny_llama, write_rows

STEPS = 5


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("world_size", "pipe", "optimizer", "fused_loss"),
    [
        (2, 2, "sgd", "auto"),
        (2, 2, "sgd", "on"),
        (4, 2, "adamw", "auto"),
        (4, 2, "sgd", "auto"),
        (3, 3, "adamw", "auto"),
        (2, 1, "adamw", "auto"),
    ],
)
def test_equals_one_process(
    ranks: Callable[[int], Ranks],
    tmp_path: Path,
    world_size: int,
    pipe: int,
    optimizer: str,
    fused_loss: str,
    tied: bool,
) -> None:
    import torch
    from safetensors.torch import load_file

    model = tiny_llama(tmp_path / "model", tied=tied)
    data = write_rows(tmp_path / "data", random_rows(22, labels=True, packed=True), files=3)
    options = {
        "optimizer": optimizer,
        "learning_rate": 0.05 if optimizer == "sgd" else 1e-3,
        "gradient_clipping": 0.7,
        "seed": 7,
    }
    data_size = world_size // pipe
    ranks(world_size).run(
        train_rank,
        {
            **options,
            "model": model,
            "train_data": (str(data),),
            "precision": "fp32",
            "pipe_parallel_size": pipe,
            "gradient_accumulation_steps": 4 // data_size,
            "per_device_train_batch_size": 2,
            "max_steps": STEPS,
            "lr_scheduler_type": "constant",
            "output_dir": tmp_path / "out",
            "partition_method": "uniform",
            "fused_loss": fused_loss,
        },
    )
    losses, norms, weights = train_reference(
        model, batches_in_order(data, steps=STEPS, global_batch=8, seed=options["seed"]), options=options
    )
    found = records(tmp_path / "out/log")
    assert [record["step"] for record in found] == list(range(1, STEPS + 1))
    np.testing.assert_allclose([record["loss"] for record in found], losses, atol=1e-5)
    np.testing.assert_allclose([record["grad_norm"] for record in found], norms, rtol=1e-4)
    exported: dict[str, torch.Tensor] = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        exported |= load_file(path)
    assert set(weights) - set(exported) == ({"lm_head.weight"} if tied else set())
    for name, tensor in exported.items():
        torch.testing.assert_close(tensor, weights[name], atol=1e-5 if optimizer == "sgd" else 1e-4, rtol=0)
