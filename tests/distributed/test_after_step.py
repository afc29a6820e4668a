"""What follows an update, on stages, is what the formulas do to adapters in one process; records tell of all stages."""

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("peft", reason="peft is not installed: pip install .[adapters]")

from tests.distributed.adapted import LINEAR, SGD, adapter_in, peft_adapter, save_model
from tests.distributed.ranks import Ranks
from tests.distributed.reference import batches_in_order, targets_of, train_model
from tests.distributed.runs import options_of, records, train_rank
from tests.fixtures import random_rows, write_rows

STEPS = 12
IN_FULL = float(os.environ.get("JLLM_TEST_SIZE", "1")) > 1
DECAY, LIMIT, RATE = 0.8, 0.5, 0.2


def run_of(folder: Path, more: dict[str, Any], *, pipe: int = 2, world_size: int = 2) -> dict[str, Any]:
    return options_of(
        folder,
        {
            **SGD,
            "gradient_clipping": 0.7,
            "seed": 7,
            "pipe_parallel_size": pipe,
            "gradient_accumulation_steps": 4 // (world_size // pipe),
            "per_device_train_batch_size": 2,
            "max_steps": STEPS,
            "lr_scheduler_type": "constant",
            "output_dir": folder / "out",
            "partition_method": "uniform",
            **more,
        },
    )


class FollowedSgd:
    """Plain SGD, then the decay of BA and the limit of its norm as their formulas are written."""

    def __init__(self, model: Any, scale: float) -> None:
        import torch

        named = dict(model.named_parameters())
        self.pairs = [
            (value, named[name.replace("lora_A", "lora_B")]) for name, value in named.items() if "lora_A" in name
        ]
        self.scale, self.norms = scale, []
        self.inner = torch.optim.SGD([each for each in named.values() if each.requires_grad], lr=RATE)

    def zero_grad(self) -> None:
        self.inner.zero_grad()

    def step(self) -> None:
        import torch

        self.inner.step()
        norms = []
        with torch.no_grad():
            for a, b in self.pairs:
                first, second = a.clone(), b.clone()
                a -= RATE * DECAY * second.T @ second @ first
                b -= RATE * DECAY * second @ first @ first.T
                norm = self.scale * torch.linalg.norm(b @ a)
                factor = min(1.0, LIMIT / float(norm)) ** 0.5
                a *= factor
                b *= factor
                norms.append(float(self.scale * torch.linalg.norm(b @ a)))
        self.norms.append(norms)


@pytest.mark.parametrize(("world_size", "pipe"), [(2, 2), (4, 2)] if IN_FULL else [(2, 2)])
def test_decay_and_limit_of_the_product(
    ranks: Callable[[int], Ranks], tmp_path: Path, world_size: int, pipe: int
) -> None:
    import torch

    model = save_model(tmp_path / "model", "llama tied")
    data = write_rows(tmp_path / "data", random_rows(22, vocabulary=96, labels=True, packed=True), files=3)
    adapted = peft_adapter(model, tmp_path / "adapter", {"target_modules": LINEAR})
    more = {"lora": tmp_path / "adapter", "lora_weight_decay": DECAY, "lora_max_norm": LIMIT}
    options = run_of(tmp_path, more, pipe=pipe, world_size=world_size)
    assert ranks(world_size).run(train_rank, options) == [None] * world_size
    follower = FollowedSgd(adapted, scale=2.0)
    batches = batches_in_order(data, steps=STEPS, global_batch=8, seed=7)
    losses, _ = train_model(adapted, batches, options=options, optimizer=follower)
    found = records(tmp_path / "out/log")
    np.testing.assert_allclose([record["loss"] for record in found], losses, rtol=1e-6)
    adapted.save_pretrained(tmp_path / "expected")
    expected, left = adapter_in(tmp_path / "expected"), adapter_in(tmp_path / "out")
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=0)
    for record, norms in zip(found, follower.norms, strict=True):
        assert record["lora_norm_max"] <= LIMIT + 1e-4
        for kind, value in (("avg", np.mean(norms)), ("min", min(norms)), ("max", max(norms))):
            assert record[f"lora_norm_{kind}"] == pytest.approx(value, rel=1e-4)
        assert record["lora_decay_min"] > 0


def test_values_that_are_not_finite_end_the_run(ranks: Callable[[int], Ranks], tmp_path: Path) -> None:
    """On every process, with one line that says what to do; nothing is exported."""
    save_model(tmp_path / "model", "llama tied")
    write_rows(tmp_path / "data", random_rows(22, vocabulary=96), files=3)
    more = {"lora_dim": 4, "learning_rate": 1e30, "gradient_clipping": 0.0, "lora_weight_decay": 1.0, "on_nan": "skip"}
    found = ranks(2).run(train_rank, run_of(tmp_path, more))
    assert found[0] is not None
    assert found[0] == found[1]
    assert "has values that are not finite; lower --learning_rate" in found[0]
    assert not (tmp_path / "out/adapter_model.safetensors").exists()


def class_rows(count: int) -> list[dict[str, Any]]:
    """Rows whose documents are of a class each."""
    rng = np.random.default_rng(5)
    rows = random_rows(count, vocabulary=96, labels=True, packed=True)
    for row in rows:
        bounds = row["cu_seqlens"]
        row["control_class"] = [
            int(kind) for start, end in itertools.pairwise(bounds) for kind in [rng.integers(-1, 2)] * (end - start)
        ]
    return rows


@pytest.mark.parametrize(("world_size", "pipe"), [(2, 2), (4, 2)] if IN_FULL else [(4, 2)])
def test_control_adapters_equal_the_whole_model(
    ranks: Callable[[int], Ranks], tmp_path: Path, world_size: int, pipe: int
) -> None:
    """20 steps with recomputed layers: losses, and every number of the adapters."""
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import AutoModelForCausalLM

    from jllm.models.adapters.control_folder import KIND
    from tests.models.adapters.whole_control import WholeControl

    gamma, decay, rate, steps = 0.5, 0.3, 0.3, 20
    model = save_model(tmp_path / "model", "llama tied")
    data = write_rows(tmp_path / "data", class_rows(22), files=3)
    more = {
        "control_adapter_rank": 4,
        "control_adapter_gamma": gamma,
        "control_weight_decay": decay,
        "control_adapter_layers": "0:1,3",
        "checkpoint_grad_interval": 1,
        "learning_rate": rate,
        "gradient_clipping": 0.0,
        "checkpoint": tmp_path / "start",
        "only_ckpt_lora": True,
        "steps_per_checkpoint": steps,
        "max_steps": steps,
    }
    options = run_of(tmp_path, more, pipe=pipe, world_size=world_size)
    begun = {**options, "learning_rate": 0.0, "max_steps": 1, "output_dir": tmp_path / "begun", "checkpoint": None,
             "only_ckpt_lora": False}  # fmt: skip
    assert ranks(world_size).run(train_rank, begun) == [None] * world_size
    assert ranks(world_size).run(train_rank, options) == [None] * world_size
    begin, left = adapter_in(tmp_path / "begun"), adapter_in(tmp_path / "out")
    prefix = "base_model.model."
    layers = sorted({name.removeprefix(prefix).rpartition(".")[0] for name in begin})
    assert layers == ["model.layers.0", "model.layers.1", "model.layers.3"]
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).train()
    values = {name: (begin[f"{prefix}{name}.control_Q"], begin[f"{prefix}{name}.control_S"]) for name in layers}
    control = WholeControl(whole, values)
    losses = []
    for batch in batches_in_order(data, steps=steps, global_batch=8, seed=7):
        trained = sum(int((targets_of(row) != -100).sum()) for row in batch)
        total = 0.0
        for row in batch:
            targets = torch.tensor(targets_of(row))
            control.classes = torch.where(targets == -100, 0, torch.tensor(row["control_class"][1:]))[None]
            logits = whole(input_ids=torch.tensor(row["input_ids"][:-1])[None]).logits[0]
            loss = cross_entropy(logits, targets, ignore_index=-100, reduction="sum") / trained
            loss.backward()
            total += float(loss.detach())
        losses.append(total)
        with torch.no_grad():
            for name, parameter in control.parameters.items():
                parameter -= rate * parameter.grad  # type: ignore[operator]
                parameter.grad = None
                if name.endswith("control_Q"):
                    parameter -= gamma * parameter @ (parameter.T @ parameter - torch.eye(4))
                else:
                    parameter *= 1 - rate * decay
    found = records(tmp_path / "start/log")
    np.testing.assert_allclose([record["loss"] for record in found], losses, rtol=2e-6)
    for name, parameter in control.parameters.items():
        torch.testing.assert_close(left[prefix + name], parameter.detach(), atol=1e-5, rtol=0)
    strengths = [float(torch.expm1(value).abs().max()) for name, value in left.items() if name.endswith("_S")]
    assert found[-1]["control_lambda_max"] == pytest.approx(max(strengths), rel=1e-5)
    assert found[-1]["control_lambda_avg"] == pytest.approx(np.mean(strengths), rel=1e-5)
    assert max(strengths) > 0
    assert found[-1]["control_skew_max"] < 1e-3
    assert KIND in (tmp_path / "out/adapter_config.json").read_text()


def test_control_adapters_go_on(ranks: Callable[[int], Ranks], tmp_path: Path) -> None:
    """From a checkpoint, bit by bit; data without classes, and another adapter, are refused."""
    save_model(tmp_path / "model", "llama tied")
    write_rows(tmp_path / "data", class_rows(22), files=3)
    write_rows(tmp_path / "plain", random_rows(22, vocabulary=96), files=3)
    more = {"control_adapter_rank": 4, "learning_rate": 0.1, "optimizer": "adamw", "max_steps": 6,
            "steps_per_checkpoint": 3, "lr_scheduler_type": "constant"}  # fmt: skip
    whole = run_of(tmp_path, {**more, "checkpoint": tmp_path / "whole"})
    assert ranks(2).run(train_rank, whole) == [None, None]
    first = {**whole, "checkpoint": tmp_path / "parts", "max_steps": 3, "output_dir": None}
    assert ranks(2).run(train_rank, first) == [None, None]
    then = {**whole, "checkpoint": tmp_path / "parts", "output_dir": tmp_path / "out2", "resume_ckpt": "auto"}
    other = {**then, "control_adapter_rank": 2}
    [refused, _] = ranks(2).run(train_rank, other)
    assert refused is not None
    assert "control_adapter_rank was 4 in the checkpoint" in refused
    assert ranks(2).run(train_rank, then) == [None, None]
    expected, left = adapter_in(tmp_path / "out"), adapter_in(tmp_path / "out2")
    assert expected.keys() == left.keys()
    assert all(bool((value == left[name]).all()) for name, value in expected.items())
    [refused, _] = ranks(2).run(train_rank, {**whole, "train_data": (str(tmp_path / "plain"),), "checkpoint": None})
    assert refused is not None
    assert "has no column control_class; make its classes with raw2ids --control_class" in refused
