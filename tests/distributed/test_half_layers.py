"""Stages that are cut inside layers, through DeepSpeed: losses, norms and weights of one plain transformers process."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.pairs import random_pairs, write_pairs
from tests.distributed.ranks import Ranks
from tests.distributed.reference import batches_in_order, train_reference
from tests.distributed.runs import SHORT, records, train_ranks
from tests.distributed.runs import options_of as short_run
from tests.fixtures import VOCABULARY, random_rows, write_rows
from tests.models.family_check import make_folder
from tests.models.tiny import tiny_config

STEPS = 3
FAMILIES = ("llama", "gemma2", "mixtral", "gpt_oss")
TIED = ("gemma2",)
AT_BOTH_ENDS = {"pipe_parallel_size": 3, "partition_method": "1,1"}
"""The first stage and the last one have half a layer: there states leave and enter where no stand-in is."""
CUTS: dict[int, dict[str, Any]] = {
    2: {"llama": "3,5", "gemma2": "5,3", "mixtral": "0,3,8", "gpt_oss": "1,7"},
    3: {"llama": "1,1", "gemma2": "0,3,5,8", "mixtral": "1,1", "gpt_oss": "0,2,3,8"},
}
"""Stages → family → `--partition_method` in half layers, of which the models have eight."""
MORE: dict[str, dict[str, Any]] = {
    "llama": {"checkpoint_grad_interval": 2},
    "gemma2": {"checkpoint_grad_attention": True},
    "mixtral": {"schedule": "overlapped"},
}
"""What a family's runs have beside the cut, one thing each."""
SETTINGS: dict[str, Any] = {"optimizer": "sgd", "learning_rate": 0.02, "gradient_clipping": 0.7, "seed": 7}
HAS_BITS = importlib.util.find_spec("bitsandbytes") is not None
HALF: dict[str, Any] = {"split_dlayer": True, "partition_method": "3,5"}
WHOLE: dict[str, Any] = {"partition_method": "uniform"}


def options_of(folder: Path, family: str, name: str, **more: Any) -> dict[str, Any]:
    """Options of a run on two stages, whose folder is `name` beside the family's."""
    settings = {**SETTINGS, **SHORT, "max_steps": STEPS, "output_dir": folder / f"{family} {name}"}
    return short_run(folder, settings, **{"model": folder / family, **more})


def resumed_runs(folder: Path) -> list[dict[str, Any]]:
    """Four steps cut inside a layer; from the second one on between layers; from the third one on inside another."""
    steps = {"optimizer": "adamw", "learning_rate": 1e-2, "max_steps": 4, "steps_per_checkpoint": 1}
    cuts = {"half": HALF, "whole": WHOLE, "other": {**HALF, "partition_method": "7,1"}}
    before = [
        {},
        *({"resume_ckpt": str(folder / f"{name} ckpt"), "tag": tag} for name, tag in (("half", "2"), ("whole", "3"))),
    ]
    return [
        options_of(folder, "llama", f"resumed {name}", **steps, **cut, **more, checkpoint=folder / f"{name} ckpt")
        for (name, cut), more in zip(cuts.items(), before, strict=True)
    ]


def compared_runs(folder: Path) -> list[dict[str, Any]]:
    """Pairs of runs, of which only the second is cut inside layers: routers that are evened, preference pairs, and a
    model in few bits whose adapters and head train."""
    bits = {"load_in_4bit": True, "lora_dim": 4, "lora_target_modules": "q_proj", "modules_to_save": "lm_head"}
    pairs = {"train_data": (str(folder / "pairs"),), "loss": "simpo", "beta": 1.5}
    what: dict[str, dict[str, Any]] = {"mixtral balanced": {"router_aux_loss_coef": 0.5}, "llama pairs": pairs}
    if HAS_BITS:
        what["mixtral bits"] = bits
    return [
        options_of(folder, name.split()[0], f"{name.split()[1]} {end}", **more, **cut)
        for name, more in what.items()
        for end, cut in (("whole", WHOLE), ("half", HALF))
    ]


def adapter_runs(folder: Path) -> list[dict[str, Any]]:
    """The same with adapters on attention only: the last stage has nothing that trains."""
    lora = {"lora_dim": 4, "lora_target_modules": "q_proj,o_proj", "pipe_parallel_size": 3, "learning_rate": 0.2}
    cuts = {"whole": WHOLE, "half": {"split_dlayer": True, **AT_BOTH_ENDS}}
    return [options_of(folder, "llama", f"adapters {name}", **{**lora, **cut}) for name, cut in cuts.items()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, and what all runs left, those of as many processes in one group."""
    folder = tmp_path_factory.mktemp("halves")
    write_rows(folder / "data", random_rows(16, labels=True, packed=True), files=2)
    write_pairs(folder / "pairs", random_pairs(40, vocab=VOCABULARY, longest=8), length=52, per_file=9)
    for family in (*FAMILIES, "cohere"):
        make_folder(tiny_config(family, tied=family in TIED, vocab_size=VOCABULARY), folder / family)
    further = {2: [*resumed_runs(folder), *compared_runs(folder)], 3: adapter_runs(folder)}
    for count, cuts in CUTS.items():
        runs = [
            options_of(
                folder, family, f"in {count}", split_dlayer=True, pipe_parallel_size=count, partition_method=cut,
                **MORE.get(family, {}),
            )
            for family, cut in cuts.items()
        ]  # fmt: skip
        runs += further[count]
        assert Ranks(count).run(train_ranks, runs) == [[None] * len(runs)] * count
    return folder


def weights_in(folder: Path) -> dict[str, Any]:
    """Every tensor once."""
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        assert not found.keys() & tensors.keys()
        found |= tensors
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_one_process(folder: Path, family: str) -> None:
    """And what is left is the whole model, every tensor once, which plain transformers loads."""
    import torch
    from transformers import AutoModelForCausalLM

    batches = batches_in_order(folder / "data", steps=STEPS, global_batch=4, seed=7)
    losses, norms, weights = train_reference(folder / family, batches, options=SETTINGS)
    ids = torch.arange(5, 25)[None]
    for count in CUTS:
        left, where = folder / f"{family} in {count}", f"{count} stages"
        found = records(left / "log")
        np.testing.assert_allclose([record["loss"] for record in found], losses, atol=1e-5, err_msg=where)
        np.testing.assert_allclose([record["grad_norm"] for record in found], norms, rtol=1e-4, err_msg=where)
        assert weights_in(left).keys() == weights_in(folder / family).keys()
        model = AutoModelForCausalLM.from_pretrained(left, dtype=torch.float32)
        for key, tensor in model.state_dict().items():
            off = float((tensor - weights[key]).abs().max())
            assert off <= 1e-5, f"{key}, {where}: {off}"
        with torch.no_grad():
            logits = model(input_ids=ids).logits
            model.load_state_dict(weights)
            torch.testing.assert_close(logits, model(input_ids=ids).logits, atol=1e-4, rtol=1e-4)


def test_a_checkpoint_goes_on_with_other_cuts(folder: Path) -> None:
    """Weights and AdamW's state: written inside a layer, read between layers, and the other way round."""
    import torch

    names = ("half", "whole", "other")
    half, whole, other = (records(folder / f"{name} ckpt/log") for name in names)
    assert [len(each) for each in (half, whole, other)] == [4, 2, 1]
    for key in ("loss", "grad_norm"):
        expected = [record[key] for record in half]
        np.testing.assert_allclose([record[key] for record in whole], expected[2:], rtol=1e-5)
        np.testing.assert_allclose([record[key] for record in other], expected[3:], rtol=1e-5)
    one, *others = (weights_in(folder / f"llama resumed {name}") for name in names)
    for found in others:
        for key, tensor in found.items():
            torch.testing.assert_close(tensor, one[key], atol=1e-5, rtol=0)


@pytest.mark.parametrize("runs", ["mixtral balanced", "llama pairs", "llama adapters", "mixtral bits"])
def test_cuts_make_no_difference(folder: Path, runs: str) -> None:
    import torch

    if runs == "mixtral bits" and not HAS_BITS:
        pytest.skip("bitsandbytes is not installed: pip install .[adapters]")

    whole, half = (records(folder / f"{runs} {name}/log") for name in ("whole", "half"))
    assert len(whole) == STEPS
    for key in {"loss", "grad_norm", "aux_loss", "max_expert_load", "accuracy", "margin"} & whole[0].keys():
        np.testing.assert_allclose([each[key] for each in half], [each[key] for each in whole], rtol=1e-5, err_msg=key)
    expected, found = (weights_in(folder / f"{runs} {name}") for name in ("whole", "half"))
    assert expected.keys() == found.keys()
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, expected[key], atol=1e-5, rtol=0)


def test_families_that_are_not_shown_are_refused(folder: Path) -> None:
    """In a dry run as in a run, on a line."""
    runs = [options_of(folder, "cohere", "refused", **HALF, dry_run=dry) for dry in (True, False)]
    [planned, run], *others = Ranks(2).run(train_ranks, runs)
    assert planned == run
    assert planned.startswith("--split_dlayer: layers of model type 'cohere' cannot be cut inside: ")
    assert "\n" not in planned
    assert others == [[None, run]]
