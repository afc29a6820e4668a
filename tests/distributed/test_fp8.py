"""Runs with `--fp8`, emulated: two stages are one, resuming is exact, what is exported is a plain model's folder."""

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.ranks import Ranks
from tests.distributed.runs import records, train_rank
from tests.fixtures import random_rows, tiny_llama, write_rows

STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torchao", reason="torchao is not installed: pip install .[fp8]")
    folder = tmp_path_factory.mktemp("fp8")
    tiny_llama(folder / "model", tied=False, dtype="bfloat16")
    write_rows(folder / "data", random_rows(26, labels=True, packed=True), files=2)
    write_rows(folder / "eval", random_rows(5, seed=1), files=1)
    return folder


def train_emulated(runs: list[dict[str, Any]], console: Path) -> list[str | None]:
    """Several runs, one after another; what the first process says of them is in `console`."""
    import jllm.train.fp8

    jllm.train.fp8.EMULATED_ON = ("cpu",)  # these processes end with the runs
    place = console if os.environ["RANK"] == "0" else Path(os.devnull)
    with place.open("w") as file, contextlib.redirect_stdout(file):
        return [train_rank(options) for options in runs]


def options_of(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "model": folder / "model",
        "train_data": (str(folder / "data"),),
        "eval_data": (str(folder / "eval"),),
        "fp8": "tensorwise",
        "per_device_train_batch_size": 2,
        "global_batch_size": 8,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "gradient_clipping": 0.7,
        "steps_per_eval": 2,
        "fused_loss": "on",
        "partition_method": "uniform",
        **more,
    }


def losses(folder: Path) -> list[float]:
    return [record[key] for key in ("loss", "eval_loss") for record in records(folder, key)]


def test_stages_are_one_and_the_export_is_plain(ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path) -> None:
    """With recomputation, packed rows kept apart, masters, and gradients summed over micro-batches.

    Without clipping: stages sum the norm in another order than one process, and its last bit scales every gradient.
    """
    shared = {"block_mask": True, "checkpoint_grad_interval": 1, "gradient_clipping": 0.0}
    for pipe in (1, 2):
        place = tmp_path / str(pipe)
        more = {**shared, "pipe_parallel_size": pipe, "output_dir": place, "log_dir": place / "log"}
        answers = ranks(pipe).run(train_emulated, [options_of(folder, **more)], tmp_path / "console")
        assert answers == [[None]] * pipe
        said = (tmp_path / "console").read_text()
        assert said.count("fp8: 28 of 28 linear maps of decoder layers (tensorwise)\n") == 1
        assert said.count("fp8 pays where decoder layers are compiled, and they are not") == 1
    more = {**shared, "fp8": "off", "output_dir": tmp_path / "bf16", "log_dir": tmp_path / "bf16/log"}
    assert ranks(1).run(train_emulated, [options_of(folder, **more)], tmp_path / "console") == [[None]]
    assert "linear maps" not in (tmp_path / "console").read_text()
    one, two, bf16 = (losses(tmp_path / name / "log") for name in ("1", "2", "bf16"))
    assert one == two
    assert one != bf16
    assert max(abs(found - expected) / expected for found, expected in zip(one, bf16, strict=True)) < 0.05
    tensors = [load_all(tmp_path / name) for name in ("1", "2", "bf16")]
    shapes = [{name: (each.shape, each.dtype) for name, each in found.items()} for found in tensors]
    assert shapes[0] == shapes[1] == shapes[2]
    assert all(torch.equal(tensors[0][name], each) for name, each in tensors[1].items())
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("1", "bf16")]
    assert configs[0] == configs[1]


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


@pytest.mark.parametrize(("optimizer", "pipe"), [("adamw", 1), ("adamw_kahan", 2)])
def test_resume(ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path, optimizer: str, pipe: int) -> None:
    """Bit-identical, with masters dealt to two pipelines, and without any; another recipe, or none, is another run."""
    if optimizer == "adamw_kahan":
        pytest.importorskip("optimi", reason="torch-optimi is not installed: pip install .[optimizers]")
    shared = {"pipe_parallel_size": pipe, "steps_per_checkpoint": 2, "optimizer": optimizer, "fp8": "rowwise"}
    whole = options_of(folder, **shared, log_dir=tmp_path / "whole")
    halved = options_of(folder, **shared, log_dir=tmp_path / "halved", checkpoint=tmp_path / "run")
    resumed = {**halved, "resume_ckpt": "auto"}
    runs = [
        whole,
        {**halved, "max_steps": 4},
        {**resumed, "fp8": "off"},
        {**resumed, "fp8": "tensorwise"},
        {**resumed, "fp8": "off", "dry_run": True},
        resumed,
    ]
    [answers, _] = ranks(2).run(train_emulated, runs, tmp_path / "console")
    told = "--fp8 was rowwise in the checkpoint's run and is {} now; give rowwise, or --force_resume"
    off, other = told.format("off"), told.format("tensorwise")
    assert answers == [None, None, off, other, off, None]
    assert losses(tmp_path / "whole") == losses(tmp_path / "halved")


def test_a_run_in_bf16_does_not_go_on_in_fp8(ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path) -> None:
    options = options_of(folder, fp8="off", checkpoint=tmp_path / "run", max_steps=1)
    other = {**options, "fp8": "rowwise", "max_steps": 2, "resume_ckpt": "auto"}
    runs = [options, other, {**other, "force_resume": True}]
    [answers] = ranks(1).run(train_emulated, runs, tmp_path / "console")
    told = "--fp8 was off in the checkpoint's run and is rowwise now; give off, or --force_resume"
    assert answers == [None, told, None]


def test_dry_run(ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path) -> None:
    """It says what the run says, and refuses what it refuses."""
    tiny = tiny_narrow(tmp_path / "narrow")
    options = options_of(folder, dry_run=True)
    [answers] = ranks(1).run(train_emulated, [options, {**options, "model": tiny}], tmp_path / "console")
    said = (tmp_path / "console").read_text()
    assert "fp8: 28 of 28 linear maps of decoder layers (tensorwise)\n" in said
    refused = (
        "--fp8 tensorwise: the decoder layers of model type 'llama' have no linear map whose sizes are multiples of"
        " 16; drop it"
    )
    assert answers == [None, refused]
    [answers] = ranks(1).run(train_emulated, [options_of(folder, model=tiny)], tmp_path / "console")
    assert answers == [refused]


def tiny_narrow(folder: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(vocab_size=97, num_hidden_layers=2, max_position_embeddings=256, **sizes)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder
