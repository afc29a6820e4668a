"""Stages that are cut inside layers, through DeepSpeed: losses, norms and weights of one plain transformers process."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.ranks import Ranks
from tests.distributed.reference import batches_in_order, train_reference
from tests.distributed.runs import records, train_ranks
from tests.fixtures import VOCABULARY, random_rows, write_rows
from tests.models.family_check import make_folder
from tests.models.tiny import tiny_config

STEPS = 3
FAMILIES = ("llama", "gemma2", "mixtral", "gpt_oss")
TIED = ("gemma2",)
CUTS: dict[str, dict[str, Any]] = {
    "2 stages": {"pipe_parallel_size": 2, "partition_method": "3,5"},
    "3 stages": {"pipe_parallel_size": 3, "partition_method": "0,3,5,8"},
    # The first and the last stage have half a layer, in which states leave or enter where no stand-in is.
    "halves at both ends": {"pipe_parallel_size": 3, "partition_method": "1,1"},
}
MORE: dict[str, dict[str, Any]] = {
    "llama": {"checkpoint_grad_interval": 2},
    "gemma2": {"checkpoint_grad_attention": True},
    "mixtral": {"schedule": "overlapped"},
}
"""What a family's runs have beside the cut, one thing each."""
SETTINGS: dict[str, Any] = {"optimizer": "sgd", "learning_rate": 0.02, "gradient_clipping": 0.7, "seed": 7}


def options_of(folder: Path, family: str, name: str, **more: Any) -> dict[str, Any]:
    return {
        **SETTINGS,
        "model": folder / family,
        "train_data": (str(folder / "data"),),
        "precision": "fp32",
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "max_steps": STEPS,
        "lr_scheduler_type": "constant",
        "split_dlayer": True,
        "output_dir": folder / family / name,
        **more,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of each family, and what its runs left, all of those of as many processes in one group."""
    folder = tmp_path_factory.mktemp("halves")
    write_rows(folder / "data", random_rows(12, labels=True, packed=True), files=2)
    for family in FAMILIES:
        make_folder(tiny_config(family, tied=family in TIED, vocab_size=VOCABULARY), folder / family)
    for count in (2, 3):
        runs = [
            options_of(folder, family, name, **cut, **MORE.get(family, {}))
            for family in FAMILIES
            for name, cut in CUTS.items()
            if cut["pipe_parallel_size"] == count
        ]
        assert Ranks(count).run(train_ranks, runs) == [[None] * len(runs)] * count
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_one_process(folder: Path, family: str) -> None:
    """And what is left is the whole model, every tensor once, which plain transformers loads."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    losses, norms, weights = train_reference(
        folder / family, batches_in_order(folder / "data", steps=STEPS, global_batch=4, seed=7), options=SETTINGS
    )
    published = sorted(name for path in (folder / family).glob("*.safetensors") for name in load_file(path))
    ids = torch.arange(5, 25)[None]
    for name in CUTS:
        left = folder / family / name
        found = records(left / "log")
        np.testing.assert_allclose([record["loss"] for record in found], losses, atol=1e-5, err_msg=name)
        np.testing.assert_allclose([record["grad_norm"] for record in found], norms, rtol=1e-4, err_msg=name)
        assert sorted(each for path in left.glob("*.safetensors") for each in load_file(path)) == published
        model = AutoModelForCausalLM.from_pretrained(left, dtype=torch.float32)
        for key, tensor in model.state_dict().items():
            torch.testing.assert_close(
                tensor, weights[key], atol=1e-5, rtol=0, msg=lambda m, w=(name, key): f"{w}: {m}"
            )
        with torch.no_grad():
            logits = model(input_ids=ids).logits
            model.load_state_dict(weights)
            torch.testing.assert_close(logits, model(input_ids=ids).logits, atol=1e-4, rtol=1e-4)
