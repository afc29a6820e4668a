"""What a model keeps in fp32 has that dtype while it is trained in bf16, and in what a run exports."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.distributed.ranks import Ranks
from tests.distributed.runs import options_of, train_rank
from tests.fixtures import random_rows, write_rows
from tests.models.tiny import tiny_config

BIAS = "e_score_correction_bias"


def dtypes_while_training(options: dict[str, Any]) -> dict[str, str]:
    """One rank of a run; the dtypes that its routing biases and norms have after the last step."""
    from jllm.train import trainer

    seen: dict[str, str] = {}
    real = trainer.export_run

    def looked_at(config: Any, agreement: Any, stage: Any, *rest: Any, **more: Any) -> None:
        seen.update({name: str(tensor.dtype) for name, tensor in stage.model.state_dict().items()})
        real(config, agreement, stage, *rest, **more)

    trainer.export_run = looked_at
    try:
        assert train_rank(options) is None
    finally:
        trainer.export_run = real
    return seen


def published(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("model*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("precision", ["bf16"])
def test_a_routing_bias_stays_fp32(ranks: Callable[[int], Ranks], tmp_path: Path, precision: str) -> None:
    """And a norm that the published files hold in fp32 is exported so, whatever it is trained in."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("deepseek_v3"), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    [path] = (tmp_path / "model").glob("model.safetensors")
    tensors = load_file(path)
    biases = [name for name in tensors if name.endswith(BIAS)]
    assert biases
    for name in biases:
        tensors[name] = torch.rand(tensors[name].shape) / 3  # not what bf16 can hold
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    save_file(tensors, path, metadata={"format": "pt"})
    rows = random_rows(8, vocabulary=model.config.vocab_size)
    write_rows(tmp_path / "data", rows)
    settings = {"precision": precision, "max_steps": 2, "learning_rate": 1e-2, "checkpoint": tmp_path / "ckpt"}
    options = options_of(tmp_path, settings, output_dir=tmp_path / "out")
    seen: dict[str, str] = {}
    for found in ranks(2).run(dtypes_while_training, options):
        seen |= found
    assert {seen[name] for name in seen if name.endswith(BIAS)} == {"torch.float32"}
    assert seen["model.norm.weight"] == "torch.bfloat16"
    exported = published(tmp_path / "out")
    assert {name: each.dtype for name, each in exported.items()} == {name: each.dtype for name, each in tensors.items()}
    assert all(torch.equal(exported[name], tensors[name]) for name in biases)
    assert not torch.equal(exported["model.norm.weight"], tensors["model.norm.weight"])
    # No checkpoint holds a buffer, so a conversion takes it from the model.
    del settings["checkpoint"], settings["max_steps"]
    more = {"from_ckpt": tmp_path / "ckpt", "num_train_epochs": 0, "output_dir": tmp_path / "again"}
    assert ranks(2).run(train_rank, options_of(tmp_path, settings, **more)) == [None, None]
    again = published(tmp_path / "again")
    assert again.keys() == exported.keys()
    for name, tensor in exported.items():
        assert torch.equal(again[name], tensor), name
