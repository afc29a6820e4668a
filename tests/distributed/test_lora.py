"""LoRA on stages trains what peft trains on the whole model in one process, from a folder that peft wrote."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("peft", reason="peft is not installed: pip install .[adapters]")

from tests.distributed.adapted import (
    ADAMW,
    LINEAR,
    SGD,
    STEPS,
    adapter_in,
    lora_options,
    peft_adapter,
    save_model,
    steps_options,
)
from tests.distributed.ranks import Ranks
from tests.distributed.reference import batches_in_order, train_model
from tests.distributed.runs import options_of, records, train_rank
from tests.fixtures import random_rows, write_rows

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], int, int]] = {
    "tied, 2 stages": ("llama tied", {"target_modules": LINEAR}, SGD, 2, 2),
    "2 x 2": ("llama", {"target_modules": LINEAR}, ADAMW, 4, 2),
    "one layer alone, DoRA": (
        "llama tied", {"target_modules": LINEAR, "layers_to_transform": [0], "use_dora": True}, SGD, 2, 2,
    ),
    "rsLoRA and the head": (
        "llama", {"target_modules": ["q_proj", "lm_head"], "use_rslora": True, "lora_alpha": 3}, SGD, 2, 2,
    ),
    "tied head": ("llama tied", {"target_modules": ["q_proj", "lm_head"]}, SGD, 2, 2),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "v_proj"]}, SGD | {"learning_rate": 0.02}, 2, 2),
    "packed experts": (
        "qwen3_moe",
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
        SGD, 2, 2,
    ),
    "head trained whole": ("llama tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, SGD, 2, 2),
    "transposed maps": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}, SGD, 2, 2),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_equals_peft(ranks: Callable[[int], Ranks], tmp_path: Path, case: str) -> None:
    """Losses, gradient norms, and every number of the adapter after 20 steps; peft loads the folder that is left."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    family, settings, optimizer, world_size, pipe = CASES[case]
    model = save_model(tmp_path / "model", family)
    data = write_rows(tmp_path / "data", random_rows(22, vocabulary=96, labels=True, packed=True), files=3)
    adapted = peft_adapter(model, tmp_path / "adapter", settings)
    more = steps_options(tmp_path, optimizer, processes=world_size, stages=pipe)
    assert ranks(world_size).run(train_rank, options_of(tmp_path, **more)) == [None] * world_size
    batches = batches_in_order(data, steps=STEPS, global_batch=8, seed=7)
    losses, norms = train_model(adapted, batches, options=more)
    found = records(tmp_path / "out/log")
    np.testing.assert_allclose([record["loss"] for record in found], losses, rtol=1e-6)
    np.testing.assert_allclose([record["grad_norm"] for record in found], norms, rtol=1e-4)
    adapted.save_pretrained(tmp_path / "expected")
    expected, left = adapter_in(tmp_path / "expected"), adapter_in(tmp_path / "out")
    # Beside an adapter on the embedding or the head peft stores the base's own tensor.
    assert expected.keys() - left.keys() == {name for name in expected if ".base_layer.weight" in name}
    for name, tensor in left.items():
        torch.testing.assert_close(
            tensor, expected[name], atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = torch.arange(3, 15)[None]
    again = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    torch.testing.assert_close(again(ids).logits, adapted.eval()(ids).logits, atol=5e-4, rtol=1e-4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(tmp_path / "model", "llama tied")
    write_rows(tmp_path / "data", random_rows(22, vocabulary=96, labels=True), files=3)
    return tmp_path


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_going_on_with_another_number_of_stages(ranks: Callable[[int], Ranks], folder: Path, stages: int) -> None:
    """The checkpoint has the adapters, their moments, and nothing of the model; the run goes on as if undisturbed."""
    from safetensors import safe_open

    assert ranks(2).run(train_rank, lora_options(folder, "whole", steps_per_checkpoint=3)) == [None, None]
    saved = folder / "whole-ckpt/step-00000003"
    names = [name for path in saved.glob("rank-*") for name in safe_open(path, "np").keys()]  # noqa: SIM118
    assert names
    assert all("lora_" in name or "rng" in name for name in names)
    more = {"pipe_parallel_size": stages, "resume_ckpt": str(saved), "checkpoint": None, "log_dir": folder / "log"}
    assert ranks(stages).run(train_rank, lora_options(folder, "again", **more)) == [None] * stages
    expected = {record["step"]: record["loss"] for record in records(folder / "whole-ckpt/log")}
    for record in records(folder / "log"):
        np.testing.assert_allclose(record["loss"], expected[record["step"]], rtol=1e-5)
    again, whole = adapter_in(folder / "again"), adapter_in(folder / "whole")
    assert again.keys() == whole.keys()
    for name, tensor in whole.items():
        np.testing.assert_allclose(again[name], tensor, atol=1e-5, err_msg=name)
        if stages == 2:
            assert (again[name] == tensor).all(), "the same layout goes on bit by bit"


def test_another_base_is_not_gone_on_with(ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path) -> None:
    """The model is not in the checkpoint: one of the same shapes would be taken for it."""
    import torch
    from transformers import AutoModelForCausalLM

    more = {"steps_per_checkpoint": 3, "log_dir": folder / "log"}
    assert ranks(2).run(train_rank, lora_options(folder, "whole", **more)) == [None, None]
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight.add_(0.01)
    model.save_pretrained(folder / "other")
    again = {"resume_ckpt": str(folder / "whole-ckpt/step-00000003"), "checkpoint": None, "log_dir": folder / "again"}
    for given, message in (
        ({"model": folder / "other"}, "--model has other weights than the model that the checkpoint's adapters"),
        ({"lora_alpha": 8.0}, "--lora_alpha was not given in the checkpoint's run and is 8.0 now; drop it"),
        ({"lora_dim": 8}, "--lora_dim was 4 in the checkpoint's run"),
    ):
        refused = ranks(2).run(train_rank, lora_options(folder, "again", **again, **given))
        assert all(str(line).startswith(message) for line in refused), refused


def test_recomputed_activations_change_nothing(ranks: Callable[[int], Ranks], folder: Path) -> None:
    for name, more in (("kept", {}), ("recomputed", {"checkpoint_grad_interval": 1})):
        given = {**more, "checkpoint": None, "log_dir": folder / f"log-{name}"}
        assert ranks(2).run(train_rank, lora_options(folder, name, **given)) == [None, None]
    kept, recomputed = adapter_in(folder / "kept"), adapter_in(folder / "recomputed")
    for name, value in kept.items():
        np.testing.assert_allclose(recomputed[name], value, atol=1e-6, err_msg=name)


def test_a_checkpoint_becomes_an_adapter(ranks: Callable[[int], Ranks], folder: Path) -> None:
    assert ranks(2).run(train_rank, lora_options(folder, "whole")) == [None, None]
    more = {"from_ckpt": folder / "whole-ckpt", "num_train_epochs": 0, "max_steps": None, "checkpoint": None}
    assert ranks(2).run(train_rank, lora_options(folder, "converted", **more)) == [None, None]
    whole, converted = adapter_in(folder / "whole"), adapter_in(folder / "converted")
    assert whole.keys() == converted.keys()
    assert all((whole[name] == converted[name]).all() for name in whole)


def test_checkpoints_of_adapters_alone(ranks: Callable[[int], Ranks], folder: Path) -> None:
    more = {"only_ckpt_lora": True, "steps_per_checkpoint": 2, "max_num_checkpoints": 2}
    assert ranks(2).run(train_rank, lora_options(folder, "whole", **more)) == [None, None]
    found = sorted(path.name for path in (folder / "whole-ckpt").glob("step-*"))
    assert found == ["step-00000004", "step-00000006"]
    newest, whole = adapter_in(folder / "whole-ckpt" / found[-1]), adapter_in(folder / "whole")
    assert all((newest[name] == whole[name]).all() for name in whole)


@pytest.mark.parametrize("settings", [{"lora_layers": "3"}, {"lora_layers": "0"}, {"lora_target_modules": "lm_head"}])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_stage_with_nothing_to_train(
    ranks: Callable[[int], Ranks], folder: Path, settings: dict[str, Any], dtype: str
) -> None:
    more = {"precision": "bf16", "lora_dtype": dtype, "checkpoint": None, "log_dir": folder / "log", "max_steps": 3}
    assert ranks(3).run(train_rank, lora_options(folder, "out", pipe_parallel_size=3, **settings, **more)) == [None] * 3
    losses = [record["loss"] for record in records(folder / "log")]
    assert losses[-1] < losses[0]
    left = adapter_in(folder / "out")
    assert str(next(iter(left.values())).dtype) == {"fp32": "torch.float32", "bf16": "torch.bfloat16"}[dtype]


def test_rates_of_loraplus(ranks: Callable[[int], Ranks], folder: Path) -> None:
    """The second matrices' rate is a multiple of the first ones', as in peft's own optimizer."""
    import torch
    from peft.optimizers import create_loraplus_optimizer

    adapted = peft_adapter(folder / "model", folder / "adapter", {"target_modules": LINEAR})
    more = {"lora": folder / "adapter", "lora_dim": None, "loraplus_lr_ratio": 8.0, "checkpoint": None}
    more |= {"gradient_clipping": 1.0, "seed": 7, "log_dir": folder / "log", "learning_rate": 1e-3}
    options = lora_options(folder, "out", **more)
    assert ranks(2).run(train_rank, options) == [None, None]
    optimizer = create_loraplus_optimizer(
        adapted,
        torch.optim.AdamW,
        lr=1e-3,
        loraplus_lr_ratio=8.0,
        eps=1e-4,
        loraplus_weight_decay=0.0,
        weight_decay=0.0,
    )
    batches = batches_in_order(folder / "data", steps=6, global_batch=4, seed=7)
    losses, _ = train_model(adapted, batches, options=options, optimizer=optimizer)
    np.testing.assert_allclose([record["loss"] for record in records(folder / "log")], losses, rtol=1e-6)
    adapted.save_pretrained(folder / "expected")
    for name, tensor in adapter_in(folder / "expected").items():
        np.testing.assert_allclose(adapter_in(folder / "out")[name], tensor, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("compute", ["adapter", "model"])
def test_a_base_in_bf16(ranks: Callable[[int], Ranks], folder: Path, compute: str) -> None:
    """Beside a bf16 model fp32 adapters have the loss and the gradients of one peft process, bit by bit or nearly.

    Multiplying in the model's type they have those of the process under autocast, but for the rounding of norms and
    of the loss, which autocast has in fp32.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    peft_adapter(folder / "model", folder / "adapter", {"target_modules": LINEAR})
    more = {
        "lora": folder / "adapter",
        "lora_dim": None,
        "precision": "bf16",
        "optimizer": "sgd",
        "adam_eps": 1e-8,  # which sgd does not have
        "max_steps": 1,
        "attn_implementation": "eager",
        "lora_compute": compute,
    }
    more |= {"learning_rate": 1.0, "gradient_clipping": 0.0, "seed": 7, "checkpoint": None, "log_dir": folder / "log"}
    options = lora_options(folder, "out", **more)
    assert ranks(2).run(train_rank, options) == [None, None]
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16, attn_implementation="eager")
    adapted = PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True).train()
    before = adapter_in(folder / "adapter")
    batches = batches_in_order(folder / "data", steps=1, global_batch=4, seed=7)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=compute == "model"):
        losses, _ = train_model(adapted, batches, options=options | {"gradient_clipping": 1e9})
    [record] = records(folder / "log")
    loss_off, gradient_off = (1e-6, 1e-3) if compute == "adapter" else (1e-3, 2e-2)
    np.testing.assert_allclose(record["loss"], losses[0], rtol=loss_off)
    adapted.save_pretrained(folder / "expected")
    left, expected = adapter_in(folder / "out"), adapter_in(folder / "expected")
    for name in before:
        # With a rate of 1 the change is the gradient.
        ours, theirs = left[name] - before[name], expected[name] - before[name]
        assert float((ours - theirs).norm()) <= gradient_off * float(theirs.norm()), name
