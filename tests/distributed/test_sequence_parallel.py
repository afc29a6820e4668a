"""Rows shared by several processes, through DeepSpeed: losses, norms, evaluations and weights of one process."""

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.ranks import Ranks
from tests.distributed.runs import records, train_rank
from tests.fixtures import VOCABULARY, random_rows, write_rows
from tests.models.family_check import make_folder
from tests.models.tiny import tiny_config

IN_FULL = float(os.environ.get("JLLM_TEST_SIZE", "1")) > 1
FAMILIES = ("llama", "gemma2", *(("qwen2", "qwen3", "mixtral", "phi3") if IN_FULL else ()))
"""All of them in any case by every gradient in `tests/models/sequence_parallel`."""
STEPS, HALF = 5, "step-00000003"
LENGTH = 29
PP2 = {"pipe_parallel_size": 2, "partition_method": "uniform"}
CUT = {"pipe_parallel_size": 2, "split_dlayer": True, "partition_method": "3,5"}
"""Two stages that are cut inside a layer."""
ULYSSES = {"sequence_parallel_size": 2, "sequence_parallel_mode": "ulysses"}
BALANCED = {"sequence_parallel_size": 2, "sequence_parallel_mode": "balanced"}
WHOLE = {"block_mask": False}
LORA = {"lora_dim": 4, "lora_target_modules": "all-linear"}
BY_TOKENS = {
    "batch_size_tokens": 70,
    "global_batch_size": None,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
}
"""Micro-batches that differ in shape."""
BF16 = {"precision": "bf16"}
NF4 = {**LORA, "load_in_4bit": True, "lora_weight_decay": 0.5, "lora_max_norm": 0.05}
INT8 = {**LORA, "load_in_8bit": True}
DORA = {**LORA, "load_in_4bit": True, "use_dora": True, "modules_to_save": "lm_head"}
ROUTED = {"_family": "mixtral", "router_aux_loss_coef": 0.5, "checkpoint_grad_interval": 1}
OFFLOADED = {"checkpoint_grad_interval": 1, "checkpoint_grad_offload": True}
ONES: dict[str, dict[str, Any]] = {
    "one": {},
    "whole": WHOLE,
    "lora": LORA,
    "nf4": NF4,
    "int8": INT8,
    "dora": DORA,
    "tokens": BY_TOKENS,
    "bf16": BF16,
    "routed": ROUTED,
}
"""Runs of one process; layouts are `_like` the first of them, or another one."""
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "ulysses": ULYSSES,
        "balanced": {**BALANCED, "_chunk": 7 * VOCABULARY},
        "chunks": {**ULYSSES, "_chunk": 5 * VOCABULARY, "_like": "whole", **WHOLE, "fused_loss": "on"},
        "ulysses, NF4": {**ULYSSES, "_like": "nf4", **NF4},
        "balanced, NF4": {**BALANCED, "_like": "nf4", **NF4},
        "balanced, 8 bits": {**BALANCED, "_like": "int8", **INT8},
        "balanced, DoRA": {**BALANCED, "_like": "dora", **DORA},
        "balanced, routed": {**BALANCED, "_like": "routed", **ROUTED},
        "exports": {**BALANCED, "only_ckpt_model": True, "_settings": {"communication_data_type": "fp32"}, **OFFLOADED},
    },
    4: {
        "pp2 x sp2": {**PP2, **BALANCED},
        "pp2 x sp2, by stage": {
            **PP2,
            **ULYSSES,
            "column_major_topology": False,
            "checkpoint_grad_interval": 1,
            "schedule": "overlapped",
        },
        "sp2 x dp2, ZeRO-1": {**BALANCED, "zero_stage": 1, "checkpoint_grad_attention": True},
        "sp4": {**BALANCED, "sequence_parallel_size": 4, "fused_loss": "on"},
        "sp2 x dp2, bf16": {**ULYSSES, "_like": "bf16", **BF16},
        "sp2 x dp2, bf16, host": {**ULYSSES, "_like": "bf16", **BF16, "offload_optimizer": True},
        "pp2 x sp2, routed": {**PP2, **ULYSSES, "_like": "routed", **ROUTED},
        "pp2 x sp2, half layers": {**CUT, **BALANCED, "checkpoint_grad_interval": 1},
        "pp2 x sp2, half layers, by heads": {**CUT, **ULYSSES, "partition_method": "1,7"},
        "pp2 x sp2, LoRA": {**CUT, **ULYSSES, "_like": "lora", **LORA, "only_ckpt_lora": True},
        "pp2 x sp2, by tokens": {**PP2, **BALANCED, "_like": "tokens", **BY_TOKENS},
    },
    8: {"pp2 x tp2 x sp2": {**CUT, **BALANCED, "model_parallel_size": 2, "fused_loss": "on"}},
}
if importlib.util.find_spec("peft") is None:
    del ONES["lora"], LAYOUTS[4]["pp2 x sp2, LoRA"]
if importlib.util.find_spec("peft") is None or importlib.util.find_spec("bitsandbytes") is None:
    for few_bits in ("nf4", "int8", "dora"):
        del ONES[few_bits]
    LAYOUTS[2] = {name: more for name, more in LAYOUTS[2].items() if more.get("_like", "one") in ONES}
SAVED = {
    "llama-ulysses": "shared-ckpt",
    "llama-sp2 x dp2, ZeRO-1": "zero-ckpt",
    "llama-pp2 x sp2, half layers": "cut-ckpt",
}
"""Runs with checkpoints, which one process goes on from."""
EXPORTED = {"llama-exports": "exports-ckpt"}
"""One whose checkpoints are folders of the model."""
KEYS = ("eval_loss", "eval_tokens", "accuracy", "top5_accuracy", "loss_p50", "entropy_p50")


def train_watched(runs: list[dict[str, Any]], data: str) -> tuple[list[str | None], list[str]]:
    """One rank of several runs, one after the other; the shard files that it opened."""
    import sys

    from jllm.models.pipeline import head

    opened: list[str] = []

    def watch(event: str, arguments: Any) -> None:
        if event == "open" and str(arguments[0]).startswith(data):
            opened.append(str(arguments[0]))

    sys.addaudithook(watch)
    elements, answers = head.CHUNK_ELEMENTS, []
    for options in runs:
        # Several chunks of tokens, each of which is computed again in the backward pass.
        head.CHUNK_ELEMENTS = options.get("_chunk", elements)
        answers.append(train_rank({name: value for name, value in options.items() if not name.startswith("_")}))
    return answers, opened


def weights_of(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def options_of(folder: Path, family: str, name: str, **more: Any) -> dict[str, Any]:
    if "_settings" in more:
        more["ds_config"] = folder / f"{name}.json"
        more["ds_config"].write_text(json.dumps(more["_settings"]))
    return {
        "model": folder / more.get("_family", family),
        "train_data": (str(folder / "data"),),
        "eval_data": (str(folder / "eval"),),
        "steps_per_eval": STEPS,
        "precision": "fp32",
        "optimizer": "sgd",
        "learning_rate": 0.02,
        "lr_scheduler_type": "constant",
        "gradient_clipping": 0.7,
        "seq_len": LENGTH,
        "block_mask": True,
        "seed": 7,
        "per_device_train_batch_size": 2,
        "global_batch_size": 4,
        "max_steps": STEPS,
        "output_dir": folder / f"{family}-{name}",
        "log_dir": folder / f"{family}-{name}-log",
        **more,
    }


def assert_alike(folder: Path, name: str, other: str) -> None:
    """A run has the last losses, norms and evaluations of another one, and its weights."""
    mine, theirs = (records(folder / f"{each}-log") for each in (name, other))
    is_rounded = other.endswith("-bf16")  # each process rounds what it has; masters are fp32
    tolerances = ({"rtol": 5e-3}, {"rtol": 0.02}) if is_rounded else ({"atol": 1e-5}, {"rtol": 1e-4})
    of_routers = [key for key in ("aux_loss", "max_expert_load") if key in theirs[0]]
    for record, expected in zip(mine, theirs[-len(mine) :], strict=True):
        assert [record[key] for key in of_routers] == pytest.approx([expected[key] for key in of_routers], abs=1e-5)
    for key, tolerance in zip(("loss", "grad_norm"), tolerances, strict=True):
        expected = [record[key] for record in theirs[-len(mine) :]]
        np.testing.assert_allclose([record[key] for record in mine], expected, **tolerance, err_msg=name)  # type: ignore[arg-type]
    if is_rounded:
        return
    [last], [expected_last] = (records(folder / f"{each}-log", "eval_loss")[-1:] for each in (name, other))
    if other.endswith("-int8"):  # an evaluation rounds by what else a process has of a micro-batch (LLM.int8)
        assert last["eval_loss"] == pytest.approx(expected_last["eval_loss"], abs=1e-3)
    else:
        assert [last[key] for key in KEYS] == pytest.approx([expected_last[key] for key in KEYS], abs=1e-5), name
        assert (last["accuracy"], last["eval_tokens"]) == (expected_last["accuracy"], expected_last["eval_tokens"])
    weights, whole = weights_of(folder / name), weights_of(folder / other)
    assert weights.keys() == whole.keys()
    worst = max(float((weights[key] - whole[key]).abs().max()) for key in whole)
    assert worst <= 1e-5, (name, worst)


def test_equals_one_process(ranks: Callable[[int], Ranks], tmp_path: Path) -> None:
    """Packed rows of an odd length; a checkpoint of one layout goes on as another; one process of eight reads."""
    write_rows(tmp_path / "data", random_rows(12, longest=LENGTH + 1, labels=True, packed=True), files=2)
    write_rows(tmp_path / "eval", random_rows(5, seed=1, longest=LENGTH + 1, packed=True))
    for family in {*FAMILIES, "mixtral"}:  # tied, with soft caps and windows: gemma2
        make_folder(tiny_config(family, tied=family == "gemma2", vocab_size=VOCABULARY), tmp_path / family)

    def run(count: int, runs: list[dict[str, Any]]) -> list[list[str]]:
        answers = ranks(count).run(train_watched, runs, str(tmp_path / "data"))
        assert [answer for answer, _ in answers] == [[None] * len(runs)] * count
        return [opened for _, opened in answers]

    pairs = [(family, name) for family in FAMILIES for name in ONES if IN_FULL or family == "llama" or name == "one"]
    alone = [options_of(tmp_path, family, name, **ONES[name]) for family, name in pairs]
    alone[0] |= {"checkpoint": tmp_path / "one-ckpt", "steps_per_checkpoint": 3}
    run(1, alone)
    for count, layouts in LAYOUTS.items():
        families = FAMILIES if IN_FULL else ("gemma2",) if count == 8 else ("llama",)
        runs = [options_of(tmp_path, family, name, **more) for name, more in layouts.items() for family in families]
        for each in runs:
            if (saved := (SAVED | EXPORTED).get(each["output_dir"].name)) is not None:
                often = 3 if saved in SAVED.values() else STEPS
                each |= {"checkpoint": tmp_path / saved, "steps_per_checkpoint": often}
            if each.get("only_ckpt_lora"):
                each |= {"checkpoint": tmp_path / "adapters", "steps_per_checkpoint": STEPS}
        if count == 2:
            runs.append(options_of(tmp_path, "llama", "on", **BALANCED, resume_ckpt=str(tmp_path / "one-ckpt" / HALF)))
        opened = run(count, runs)
        if count == 8:
            assert opened[0]
            assert opened[1:] == [[]] * 7
        for name, more in layouts.items():
            for family in families:
                if more.get("_like") == "bf16" and family == "mixtral":
                    continue  # rounding sends tokens to other experts
                assert_alike(tmp_path, f"{family}-{name}", f"{family}-{more.get('_like', 'one')}")
    if "lora" in ONES:
        [folder] = (tmp_path / "adapters").glob("step-*")
        kept, exported = weights_of(folder), weights_of(tmp_path / "llama-pp2 x sp2, LoRA")
        assert kept.keys() == exported.keys()
        assert all((kept[key] == exported[key]).all() for key in exported)
    joined = [options_of(tmp_path, "llama", name, resume_ckpt=str(tmp_path / name / HALF)) for name in SAVED.values()]
    run(1, joined)
    for name, folder in EXPORTED.items():
        exported, saved = weights_of(tmp_path / name), weights_of(tmp_path / folder / f"step-{STEPS:08d}")
        assert exported.keys() == saved.keys()
        assert all((exported[key] == saved[key]).all() for key in exported)
    on_device, on_host = (records(tmp_path / f"llama-sp2 x dp2, bf16{where}-log") for where in ("", ", host"))
    assert [record["loss"] for record in on_device] == [record["loss"] for record in on_host]
    for name in ("on", *SAVED.values()):
        assert len(records(tmp_path / f"llama-{name}-log")) == STEPS - 3
        assert_alike(tmp_path, f"llama-{name}", "llama-one")
