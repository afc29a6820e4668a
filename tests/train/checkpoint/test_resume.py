"""What makes a run another run: named, and refused unless the user insists."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from jllm.errors import UserError
from jllm.models.weights.saving import ModelFolder
from jllm.train.checkpoint.format import RunState
from jllm.train.checkpoint.resume import (
    ARCHITECTURE,
    BINDING_OPTIONS,
    TOTAL_STEPS,
    architecture_of,
    check_same_run,
    is_exported,
    other_length,
)
from jllm.train.config import TrainConfig, resolved_options
from tests.train.checkpoint.written import state_of


def run(**changed: Any) -> RunState:
    """A run of a small Llama, with some of what its checkpoint records changed."""
    config = LlamaConfig(hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=9)
    record = {
        **resolved_options(TrainConfig(model=Path("m"), train_data=("d",))),
        "global_batch": 8,
        TOTAL_STEPS: 10,
        ARCHITECTURE: architecture_of(config),
        **changed,
    }
    return dataclasses.replace(state_of(3), config=record)


def test_the_same_run_goes_on() -> None:
    check_same_run(run(), run(), forced=False)
    check_same_run(run(lora_dim=4, lora_alpha=4), run(lora_dim=4, lora_alpha=None), forced=False)


@pytest.mark.parametrize("name", BINDING_OPTIONS)
def test_every_binding_option_is_refused_by_name(name: str) -> None:
    other = run(**{name: "another"})
    shown = "global_batch_size" if name == "global_batch" else name
    with pytest.raises(UserError, match=rf"--{shown} was another in the checkpoint's run and is .*--force_resume"):
        check_same_run(other, run(), forced=False)
    check_same_run(other, run(), forced=True)


@pytest.mark.parametrize(
    ("name", "then", "now", "message"),
    [
        ("lora_alpha", None, 8.0, "--lora_alpha was not given in the checkpoint's run and is 8.0 now; drop it, or"),
        ("lora_alpha", 8.0, None, "--lora_alpha was 8.0 in the checkpoint's run and is not given now; give 8.0, or"),
        ("use_dora", False, True, "--use_dora was not given in the checkpoint's run and is given now; drop it, or"),
        ("use_dora", True, False, "--use_dora was given in the checkpoint's run and is not given now; give --use_dora"),
    ],
)
def test_what_to_do_about_a_binding_option(name: str, then: Any, now: Any, message: str) -> None:
    with pytest.raises(UserError) as refused:
        check_same_run(run(**{name: then}), run(**{name: now}), forced=False)
    assert str(refused.value).startswith(message)


def test_other_data_is_refused() -> None:
    with pytest.raises(UserError, match="--train_data has changed"):
        check_same_run(dataclasses.replace(run(), fingerprint="g"), run(), forced=False)


def test_another_architecture_is_refused_by_what_differs() -> None:
    architecture = run().config[ARCHITECTURE]
    for name, value in (("hidden_size", 16), ("rms_norm_eps", 1e-3), ("rope_parameters", {"rope_type": "linear"})):
        with pytest.raises(UserError, match=f"--model has {name}"):
            check_same_run(run(**{ARCHITECTURE: {**architecture, name: value}}), run(), forced=False)
    # Another version of transformers may know settings that this one does not.
    older = {**architecture, "transformers_version": "4.0", "gone_since": 3}
    check_same_run(run(**{ARCHITECTURE: older}), run(), forced=False)


def test_what_computes_nothing_is_no_architecture() -> None:
    one = LlamaConfig(dtype="float32", use_cache=True)
    other = LlamaConfig(dtype="bfloat16", use_cache=False)
    assert architecture_of(one) == architecture_of(other)


@pytest.mark.parametrize(
    ("more", "warned"),
    [
        ({"lr_scheduler_type": "cosine"}, True),
        ({"lr_scheduler_type": "constant"}, False),
        ({"lr_scheduler_type": "constant_with_warmup", "num_warmup_steps": 2}, False),
        ({"lr_scheduler_type": "constant_with_warmup", "num_warmup_steps": 0.1}, True),
        ({"lr_scheduler_type": "cosine", "force_constant_lr": 1e-4}, False),
    ],
)
def test_another_length_is_told_where_rates_depend_on_it(more: dict[str, Any], warned: bool) -> None:
    found = other_length(run(**{TOTAL_STEPS: 20}), run(**more))
    assert (found is not None) == warned
    assert other_length(run(), run(**more)) is None


def test_an_export_is_complete_only_after_its_checkpoint(tmp_path: Path) -> None:
    checkpoint, folder = tmp_path / "checkpoint", tmp_path / "folder"
    kind = ModelFolder(source=folder, dtype=torch.float32)
    for path in (checkpoint, folder):
        path.mkdir()
    assert not is_exported(folder, checkpoint, kind)
    (folder / "config.json").write_text("{}")
    (checkpoint / "index.json").write_text("{}")  # newer than the export
    assert not is_exported(folder, checkpoint, kind)
    (folder / "config.json").write_text("{}")
    assert not is_exported(folder, checkpoint, kind)  # no weights
    (folder / "model.safetensors").write_bytes(b"")
    assert is_exported(folder, checkpoint, kind)
