"""Slices of stages, through DeepSpeed: losses, norms and weights of one plain transformers process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.ranks import Ranks
from tests.distributed.reference import batches_in_order, train_reference
from tests.distributed.runs import records, train_rank, train_ranks
from tests.fixtures import VOCABULARY, random_rows, write_rows
from tests.models.family_check import make_folder
from tests.models.slice_check import SLICED
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
    "pp2xtp2, sharded norms": {
        "processes": 4,
        "model_parallel_size": 2,
        "pipe_parallel_size": 2,
        "sequence_sharded_norms": True,
        "checkpoint_grad_interval": 2,
    },
    "pp2xtp2, half layers": {
        "processes": 4,
        "model_parallel_size": 2,
        "pipe_parallel_size": 2,
        "split_dlayer": True,
        "partition_method": "3,5",
    },
    "pp2xtp2, half layers, sharded norms": {
        "processes": 4,
        "model_parallel_size": 2,
        "pipe_parallel_size": 2,
        "sequence_sharded_norms": True,
        "split_dlayer": True,
        "partition_method": "1,7",
        "checkpoint_grad_attention": True,
    },
    "tp2xdp2": {"processes": 4, "model_parallel_size": 2, "checkpoint_grad_attention": True},
    "tp2xdp2, ZeRO-1": {"processes": 4, "model_parallel_size": 2, "zero_stage": 1},
    "tp4": {"processes": 4, "model_parallel_size": 4},
}
FEW = {"tp4": ("llama", "qwen3"), "pp2xtp2, half layers, sharded norms": ("llama", "mixtral")}
"""Layouts that not all families are tried in."""


def test_bf16_is_near_one_process(ranks: Callable[[int], Ranks], tmp_path: Path) -> None:
    """With q/k norms, whose gradients are partial, and masters in fp32; norms count everything once."""
    model = tmp_path / "model"
    make_folder(tiny_config("qwen3", tied=True, vocab_size=VOCABULARY), model)
    data = write_rows(tmp_path / "data", random_rows(12, labels=True, packed=True), files=2)

    def options_of(name: str, **more: Any) -> dict[str, Any]:
        return {
            "model": model,
            "train_data": (str(data),),
            "precision": "bf16",
            "optimizer": "sgd",
            "learning_rate": 0.02,
            "gradient_clipping": 0.7,
            "per_device_train_batch_size": 2,
            "global_batch_size": 4,
            "max_steps": STEPS,
            "log_dir": tmp_path / name / "log",
            "partition_method": "uniform",
            **more,
        }

    assert ranks(1).run(train_rank, options_of("one")) == [None]
    runs = [
        options_of("slices", model_parallel_size=2, pipe_parallel_size=2),
        options_of("copies", model_parallel_size=2),
        options_of("host", model_parallel_size=2, offload_optimizer=True),
    ]
    assert ranks(4).run(train_ranks, runs) == [[None] * 3] * 4
    expected = records(tmp_path / "one/log")
    assert [[each[key] for key in ("loss", "grad_norm")] for each in records(tmp_path / "copies/log")] == [
        [each[key] for key in ("loss", "grad_norm")] for each in records(tmp_path / "host/log")
    ]
    for name in ("slices", "copies"):
        found = records(tmp_path / name / "log")
        np.testing.assert_allclose([each["loss"] for each in found], [each["loss"] for each in expected], rtol=5e-3)
        np.testing.assert_allclose(
            [each["grad_norm"] for each in found], [each["grad_norm"] for each in expected], rtol=0.02
        )


@pytest.mark.parametrize(
    ("family", "given"),
    [
        ("qwen3", {"frozen_modules": "q_proj,embed_tokens,k_norm"}),
        ("mixtral", {"router_aux_loss_coef": 0.5}),
        ("gemma2", {"fused_loss": "on"}),
        ("llama", {"fused_loss": "on", "loss": "star"}),
        ("llama", {"neftune_alpha": 5.0, "checkpoint_grad_interval": 1, "checkpoint_grad_offload": True}),
    ],
)
def test_with_other_options(ranks: Callable[[int], Ranks], tmp_path: Path, family: str, given: dict[str, Any]) -> None:
    """Another loss of a token, weights at random, rates of their own; parameters that stay, routers that are evened; a
    loss fused with the part of a head; noise, activations in host memory; stages that are cut inside a layer."""
    model = tmp_path / "model"
    make_folder(tiny_config(family, tied=False, vocab_size=VOCABULARY), model)
    data = write_rows(tmp_path / "data", random_rows(12, labels=True, packed=True), files=2)

    def options_of(name: str, **more: Any) -> dict[str, Any]:
        return {
            "model": model,
            "init": True,
            "train_data": (str(data),),
            "eval_data": (str(data),),
            "precision": "fp32",
            "loss": "focal",
            "loss_gamma": 2.0,
            **given,
            "module_learning_rate": ("down_proj=0.01",),
            "adam_eps": 1e-4,
            "deterministic": True,
            "per_device_train_batch_size": 2,
            "global_batch_size": 4,
            "max_steps": 3,
            "log_dir": tmp_path / name / "log",
            "output_dir": tmp_path / name / "out",
            "partition_method": "uniform",
            **more,
        }

    assert ranks(1).run(train_rank, options_of("one")) == [None]
    cut = {"split_dlayer": True, "partition_method": "3,5"}
    sliced = options_of("sliced", model_parallel_size=2, pipe_parallel_size=2, **cut)
    assert ranks(4).run(train_rank, sliced) == [None] * 4
    for key in ("loss", "eval_loss", "grad_norm", *(["aux_loss"] if family == "mixtral" else [])):
        expected, found = (records(tmp_path / name / "log", key) for name in ("one", "sliced"))
        assert expected
        np.testing.assert_allclose([each[key] for each in found], [each[key] for each in expected], atol=2e-5)
    one, other = (weights_of(tmp_path / name / "out") for name in ("one", "sliced"))
    assert one.keys() == other.keys()
    assert max(float((one[name] - other[name]).abs().max()) for name in one) <= 1e-5


def weights_of(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def train_watched(options: dict[str, Any], data: Path) -> tuple[str | None, list[str], int]:
    """One rank of a run; the shard files that it opened, and the bytes that it read of them."""
    import os
    import sys

    opened: list[str] = []

    def watch(event: str, arguments: Any) -> None:
        if event == "open" and str(arguments[0]).startswith(str(data)):
            opened.append(str(arguments[0]))

    sys.addaudithook(watch)
    answer = train_rank(options)
    mapped = Path("/proc/self/maps").read_text()
    held = [os.path.realpath(f"/proc/self/fd/{each}") for each in os.listdir("/proc/self/fd")]
    return answer, opened, mapped.count(str(data)) + sum(each.startswith(str(data)) for each in held)


def test_one_process_of_a_pipeline_reads(ranks: Callable[[int], Ranks], tmp_path: Path) -> None:
    """Token budgets: the micro-batches of a step differ in shape, and arrive everywhere as they were read."""
    model = tmp_path / "model"
    make_folder(tiny_config("llama", vocab_size=VOCABULARY), model)
    data = write_rows(tmp_path / "data", random_rows(12, labels=True, packed=True), files=2)
    options = {
        "model": model,
        "train_data": (str(data),),
        "precision": "fp32",
        "batch_size_tokens": 64,
        "block_mask": True,
        "max_steps": 3,
        "gradient_accumulation_steps": 2,
        "optimizer": "sgd",
    }
    sliced = {"model_parallel_size": 2, "pipe_parallel_size": 2, "log_dir": tmp_path / "sliced"}
    answers = ranks(4).run(train_watched, {**options, **sliced}, data)
    assert [answer for answer, _, _ in answers] == [None] * 4
    assert answers[0][1]
    assert [(opened, held) for _, opened, held in answers[1:]] == [([], 0)] * 3
    assert ranks(1).run(train_rank, {**options, "log_dir": tmp_path / "one"}) == [None]
    one, found = (records(tmp_path / name) for name in ("one", "sliced"))
    np.testing.assert_allclose([each["loss"] for each in found], [each["loss"] for each in one], atol=1e-5)


@pytest.mark.parametrize("family", [*SLICED, "deepseek_v3", "gpt_oss"])
def test_equals_one_process(ranks: Callable[[int], Ranks], tmp_path: Path, family: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = tmp_path / "model"
    make_folder(tiny_config(family, tied=family in ("gemma2", "qwen3"), vocab_size=VOCABULARY), model)
    data = write_rows(tmp_path / "data", random_rows(12, labels=True, packed=True), files=2)
    options = {"optimizer": "sgd", "learning_rate": 0.02, "gradient_clipping": 0.7, "seed": 7}
    names = [name for name in LAYOUTS if name not in FEW or family in FEW[name]]
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
                    "partition_method": "uniform",
                    **layout,
                    "model": model,
                    "train_data": (str(data),),
                    "precision": "fp32",
                    "gradient_accumulation_steps": 2 // data_size,
                    "per_device_train_batch_size": 2,
                    "max_steps": STEPS,
                    "lr_scheduler_type": "constant",
                    "output_dir": tmp_path / name,
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
            torch.testing.assert_close(
                tensor, weights[key], atol=1e-5, rtol=0, msg=lambda m, w=(name, key): f"{w}: {m}"
            )
