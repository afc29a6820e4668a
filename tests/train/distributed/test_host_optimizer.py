"""Masters and optimizer states on the host: the numbers are those of a run that has them on its device.

A test has no device beside the processor; what it shows is that the same is computed, stored and gone on with.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from jllm.errors import UserError
from jllm.train.config import TrainConfig
from tests.distributed.ranks import Ranks
from tests.distributed.runs import options_of, records, train_rank
from tests.fixtures import random_rows, tiny_llama, write_rows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_llama(tmp_path / "model", tied=True, dtype="bfloat16")
    write_rows(tmp_path / "data", random_rows(24, labels=True), files=2)
    return tmp_path


def options(folder: Path, name: str, **more: Any) -> dict[str, Any]:
    settings = {
        "precision": "bf16",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "gradient_clipping": 0.5,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "steps_per_checkpoint": 3,
        "checkpoint": folder / f"{name}-ckpt",
        "output_dir": folder / name,
        "partition_method": "uniform",
    }
    return options_of(folder, settings, **more)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


CASES = [(4, "adamw"), (2, "schedule_free"), (2, "adamw"), (2, "sgd")]
IN_FULL = float(os.environ.get("JLLM_TEST_SIZE", "1")) > 1


@pytest.mark.parametrize(("world_size", "optimizer"), CASES if IN_FULL else CASES[:2])
def test_the_same_numbers(folder: Path, world_size: int, optimizer: str) -> None:
    found = []
    for name, offloads in (("device", False), ("host", True)):
        given = options(folder, name, optimizer=optimizer, offload_optimizer=offloads)
        assert Ranks(world_size).run(train_rank, given) == [None] * world_size
        found.append(([record["loss"] for record in records(folder / f"{name}-ckpt/log")], weights(folder / name)))
    (losses, device), (others, host) = found
    # One fused kernel rounds otherwise than several do, which bf16 weights may show in their last bit.
    np.testing.assert_allclose(others, losses, rtol=1e-3)
    assert losses[-1] < losses[0]
    for name, value in device.items():
        torch.testing.assert_close(host[name], value, atol=2e-2, rtol=2e-2)


def test_it_goes_on_bit_by_bit_and_either_from_the_other(folder: Path) -> None:
    whole = options(folder, "whole", offload_optimizer=True)
    assert Ranks(2).run(train_rank, whole) == [None, None]
    parts = options(folder, "parts", offload_optimizer=True)
    assert Ranks(2).run(train_rank, {**parts, "max_steps": 3, "output_dir": None}) == [None, None]
    assert Ranks(2).run(train_rank, {**parts, "resume_ckpt": "auto"}) == [None, None]
    left = weights(folder / "parts")
    assert all(torch.equal(left[name], value) for name, value in weights(folder / "whole").items())
    expected = [record["loss"] for record in records(folder / "whole-ckpt/log")]
    assert [record["loss"] for record in records(folder / "parts-ckpt/log")] == expected
    mixed = options(folder, "mixed", offload_optimizer=False)
    assert Ranks(2).run(train_rank, {**mixed, "max_steps": 3, "output_dir": None}) == [None, None]
    on_host = {**mixed, "offload_optimizer": True, "resume_ckpt": "auto"}
    assert Ranks(2).run(train_rank, on_host) == [None, None]
    losses = [record["loss"] for record in records(folder / "mixed-ckpt/log")]
    np.testing.assert_allclose(losses, expected, rtol=1e-3)


@pytest.mark.parametrize(
    ("more", "held"),
    [
        ({"precision": "fp32"}, "fp32"),
        ({"optimizer": "adamw_8bit"}, "--optimizer adamw_8bit"),
        ({"lora_dim": 4}, "fp32"),
        ({"precision": "fp16"}, "fp16"),
    ],
)
def test_what_has_no_such_masters(more: dict[str, Any], held: str) -> None:
    given = {"model": Path("m"), "train_data": ("d",), "offload_optimizer": True, **more}
    with pytest.raises(
        UserError, match=rf"^--offload_optimizer moves the fp32 masters of bf16 weights, which {held} does"
    ):
        TrainConfig(**given)
