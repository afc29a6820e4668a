"""LoRA beside slices, in runs: the losses, norms, adapters and checkpoints of one process."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("peft", reason="peft is not installed: pip install .[adapters]")

from tests.distributed.adapted import adapter_in, lora_options, save_model
from tests.distributed.ranks import Ranks
from tests.distributed.runs import records, train_ranks
from tests.fixtures import random_rows, write_rows
from tests.models.tensor_parallel.quantised import Case

QLORA = {"load_in_4bit": True} if importlib.util.find_spec("bitsandbytes") is not None else None


def test_lora_beside_slices(tmp_path: Path) -> None:
    """Four slices share two heads; a checkpoint of 2 x 2, cut inside a layer, goes on as 1, as 4 and cut elsewhere.

    So one does beside weights in 4 bits, bit by bit on the same layout.
    """
    save_model(tmp_path / "model", "qwen3")
    write_rows(tmp_path / "data", random_rows(22, vocabulary=96, labels=True, packed=True), files=3)

    def options_of(name: str, **more: Any) -> dict[str, Any]:
        log = {"log_dir": tmp_path / f"{name}-log", "pipe_parallel_size": 1, "steps_per_checkpoint": 3}
        return lora_options(tmp_path, name, **log | {"gradient_clipping": 0.05} | more)

    half = {"resume_ckpt": str(tmp_path / "sliced-ckpt/step-00000003")}
    cut = {"model_parallel_size": 2, "pipe_parallel_size": 2, "split_dlayer": True}
    outside = options_of("outside", model_parallel_size=2, lora_target_modules="q_proj,lm_head")
    bf16 = {"precision": "bf16"}  # of another type than the model
    changed = {
        "lora_weight_decay": 0.5,
        "lora_max_norm": 0.02,
        "lora_target_modules": "k_proj,o_proj,up_proj,down_proj",
    }
    runs = [
        options_of("sliced", **cut, partition_method="3,5"),
        options_of("four", model_parallel_size=4, **half),
        options_of("elsewhere", **cut, partition_method="7,1", **half),
        outside,
        options_of("sliced-bf16", model_parallel_size=2, **bf16),
        options_of("four-changed", model_parallel_size=4, max_steps=3, **changed),
    ]
    both = {"model_parallel_size": 2, "pipe_parallel_size": 2}
    if QLORA is not None:
        Case(family="llama", settings={"attention_bias": True, "mlp_bias": True}).write(tmp_path / "wide")
        quantised = {"model": tmp_path / "wide", "optimizer": "sgd", "adam_eps": 1e-8, "learning_rate": 0.2, **QLORA}
        half_quantised = {"resume_ckpt": str(tmp_path / "sliced-nf4-ckpt/step-00000003"), **quantised}
        runs += [
            options_of("sliced-nf4", **quantised, **both),
            options_of("again-nf4", **half_quantised, **both),
            options_of("cut-nf4", **quantised, model_parallel_size=4),
        ]
    says = (
        "--model_parallel_size 4: model.layers.*.self_attn.o_proj.weight in 4 bits would have rows of 32 weights in a"
        " slice, and 64 in a row share a scale; give another number, or --skip_quant for those"
    )
    message = (
        "--model_parallel_size 2 with an adapter on lm_head: slices have them on linear maps of decoder layers; name"
        " those with --lora_target_modules"
    )
    answers = [None, None, None, message, None, None, None, None, says][: len(runs)]
    assert Ranks(4).run(train_ranks, runs) == [answers] * 4
    alone = [
        options_of("one"),
        options_of("joined", **half),
        options_of("one-changed", max_steps=3, **changed),
        options_of("one-bf16", gradient_accumulation_steps=8, **bf16),
    ]
    if QLORA is not None:
        alone += [options_of("one-nf4", **quantised), options_of("joined-nf4", **half_quantised)]
    assert Ranks(1).run(train_ranks, alone) == [[None] * len(alone)]
    names = (
        "sliced",
        "four",
        "elsewhere",
        "joined",
        "four-changed",
        *(("sliced-nf4", "again-nf4", "joined-nf4") if QLORA is not None else ()),
    )
    for name in names:
        one = next((f"one-{kind}" for kind in ("nf4", "changed") if name.endswith(kind)), "one")
        found, expected = (records(tmp_path / f"{each}-log") for each in (name, one))
        whole = adapter_in(tmp_path / one)
        assert len(found) == (6 if name.startswith("sliced") else 3)
        for key in ("loss", "grad_norm", "lora_norm_avg", "lora_norm_min", "lora_norm_max"):
            theirs = [each[key] for each in expected[-len(found) :]]
            np.testing.assert_allclose([each[key] for each in found], theirs, rtol=1e-4, atol=1e-6, err_msg=key)
        adapter = adapter_in(tmp_path / name)
        assert adapter.keys() == whole.keys()
        for key, tensor in whole.items():
            np.testing.assert_allclose(adapter[key], tensor, atol=1e-5, err_msg=f"{name}: {key}")
    if QLORA is not None:
        straight = adapter_in(tmp_path / "sliced-nf4")
        assert all((tensor == straight[key]).all() for key, tensor in adapter_in(tmp_path / "again-nf4").items())
    found, theirs = (records(tmp_path / f"{name}-bf16-log") for name in ("sliced", "one"))
    np.testing.assert_allclose([each["loss"] for each in found], [each["loss"] for each in theirs], rtol=5e-3)
    np.testing.assert_allclose([each["grad_norm"] for each in found], [each["grad_norm"] for each in theirs], rtol=0.03)


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        # Its rotary keys go straight to every slice's heads, with what the adapter adds to them.
        ("deepseek_v3", "kv_a_proj_with_mqa,kv_b_proj,q_a_proj,q_b_proj,o_proj,up_proj"),
        # Attention is whole on every slice.
        ("olmo2", "q_proj,o_proj,up_proj"),
    ],
)
def test_lora_beside_maps_that_are_whole(tmp_path: Path, family: str, targets: str) -> None:
    save_model(tmp_path / "model", family)
    write_rows(tmp_path / "data", random_rows(12, vocabulary=96, labels=True, packed=True), files=2)
    more = {
        "lora_target_modules": targets,
        "max_steps": 3,
        "pipe_parallel_size": 1,
        "optimizer": "sgd",
        "adam_eps": 1e-8,
        "learning_rate": 0.2,
    }
    for name, slices in (("sliced", 2), ("one", 1)):
        log = {"log_dir": tmp_path / f"{name}-log", "model_parallel_size": slices, "checkpoint": None}
        options = lora_options(tmp_path, name, **log, **more)
        assert Ranks(slices).run(train_ranks, [options]) == [[None]] * slices
    one, sliced = (records(tmp_path / f"{name}-log") for name in ("one", "sliced"))
    assert len(one) == 3
    for key in ("loss", "grad_norm"):
        np.testing.assert_allclose([each[key] for each in sliced], [each[key] for each in one], rtol=1e-4)
    expected, found = adapter_in(tmp_path / "one"), adapter_in(tmp_path / "sliced")
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        np.testing.assert_allclose(found[key], tensor, atol=1e-5, err_msg=key)
