"""Every optimizer goes on bit by bit from a checkpoint, on other layouts nearly so, and is the one of its package."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("optimi", reason="torch-optimi is not installed: pip install .[optimizers]")
pytest.importorskip("schedulefree", reason="schedulefree is not installed: pip install .[optimizers]")
pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install .[optimizers]")

from tests.distributed.ranks import Ranks
from tests.distributed.reference import batches_in_order, train_model
from tests.distributed.runs import options_of, records, train_rank, train_ranks
from tests.fixtures import random_rows, tiny_llama, write_rows

STEPS, SAVED = 6, 3
CONSTANT = {"lr_scheduler_type": "constant", "learning_rate": 1e-3, "adam_eps": 1e-4, "weight_decay": 0.01}
OPTIMIZERS = ("adamw", "adamw_8bit", "adamw_kahan", "schedule_free", "muon", "sgd")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    # An embedding of more than 4,096 numbers, which bitsandbytes keeps the state of in 8 bits.
    tiny_llama(tmp_path / "model", tied=True, vocabulary=400)
    write_rows(tmp_path / "data", random_rows(30, labels=True), files=3)
    return tmp_path


def options(folder: Path, name: str, optimizer: str, **more: Any) -> dict[str, Any]:
    settings = {
        **CONSTANT,
        "optimizer": optimizer,
        "gradient_accumulation_steps": 4,
        "max_steps": STEPS,
        "partition_method": "uniform",
        "checkpoint": folder / f"{name}-ckpt",
        "output_dir": folder / name,
        "eval_data": (str(folder / "data"),),
        "steps_per_eval": 2,
        "seed": 7,
    }
    if optimizer == "sgd":
        del settings["adam_eps"]
    return options_of(folder, settings, **more)


def weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def saved_tensors(checkpoint: Path) -> dict[str, Any]:
    """Everything that a checkpoint of one layout holds, but for the random states."""
    from safetensors.torch import load_file

    found = {
        f"{path.name}/{name}": value for path in checkpoint.glob("rank-*") for name, value in load_file(path).items()
    }
    return {name: value for name, value in found.items() if "rng" not in name}


@pytest.mark.parametrize(
    ("optimizer", "precision"),
    [
        *((name, "fp32") for name in OPTIMIZERS),
        *((name, "bf16") for name in ("adamw_8bit", "adamw_kahan", "schedule_free")),
    ],
)
def test_going_on(ranks: Callable[[int], Ranks], folder: Path, optimizer: str, precision: str) -> None:
    """Bit by bit on the same layout; on three stages to 1e-5 in fp32."""
    more: dict[str, Any] = {"precision": precision, "steps_per_checkpoint": SAVED}
    assert ranks(2).run(train_rank, options(folder, "whole", optimizer, **more)) == [None, None]
    saved = folder / f"whole-ckpt/step-{SAVED:08d}"
    again = {**more, "resume_ckpt": str(saved)}
    assert ranks(2).run(train_rank, options(folder, "again", optimizer, **again)) == [None, None]
    expected, found = (saved_tensors(folder / f"{name}-ckpt/step-{STEPS:08d}") for name in ("whole", "again"))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert (found[name] == value).all(), name
    kinds = {name.split("/")[1] for name in expected}
    # What only this optimizer keeps is there: blocks of 8 bits, the rest of a sum, the average, the momentum.
    own = {"adamw_8bit": "absmax1", "adamw_kahan": "step", "schedule_free": "weight_sum", "muon": "momentum_buffer"}
    assert own.get(optimizer, "weight") in kinds
    assert optimizer != "adamw_kahan" or ("kahan_comp" in kinds) == (precision == "bf16")
    whole = weights(folder / "whole")
    for stages in (3,) if precision == "fp32" else ():
        name = f"on-{stages}"
        other = options(folder, name, optimizer, **again, pipe_parallel_size=stages)
        assert ranks(stages).run(train_rank, other) == [None] * stages
        for key, value in weights(folder / name).items():
            np.testing.assert_allclose(value, whole[key], atol=1e-5, err_msg=key)


def test_slices_and_shared_rows(ranks: Callable[[int], Ranks], folder: Path) -> None:
    """Those that work element by element, over slices; over shared rows, which leave weights whole, all of them. What
    two slices saved is gone on with by one process."""
    sizes = {"slices": {"model_parallel_size": 2}, "runs": {"sequence_parallel_size": 2}}
    cases = {(kind, "slices") for kind in ("adamw_kahan", "schedule_free")}
    cases |= {(kind, "runs") for kind in OPTIMIZERS if kind not in ("adamw", "sgd")}

    def run(name: str, kind: str, **more: Any) -> dict[str, Any]:
        given: dict[str, Any] = {"gradient_accumulation_steps": 2, "pipe_parallel_size": 1, "max_steps": 3}
        given |= {"eval_data": (), "steps_per_checkpoint": 2}
        return options(folder, name, kind, **given | more)

    shared = [run(f"{kind} {how}", kind, **sizes[how]) for kind, how in sorted(cases)]
    assert ranks(2).run(train_ranks, shared) == [[None] * len(shared)] * 2
    joined = [
        run(f"{kind} joined", kind, resume_ckpt=str(folder / f"{kind} slices-ckpt/step-00000002"))
        for kind, how in sorted(cases)
        if how == "slices"
    ]
    alone = [run(f"{kind} one", kind) for kind in sorted({kind for kind, _ in cases})]
    assert ranks(1).run(train_ranks, [*alone, *joined]) == [[None] * (len(alone) + len(joined))]
    for made in (*shared, *joined):
        out = made["output_dir"]
        one = folder / f"{made['optimizer']} one"
        expected, found = ([each["loss"] for each in records(Path(f"{each}-ckpt/log"))] for each in (one, out))
        np.testing.assert_allclose(found, expected[-len(found) :], atol=1e-5, err_msg=out.name)
        whole = weights(one)
        for name, value in weights(out).items():
            np.testing.assert_allclose(value, whole[name], atol=1e-5, err_msg=f"{out.name}: {name}")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_equals_the_package(ranks: Callable[[int], Ranks], folder: Path, optimizer: str) -> None:
    """Two stages and two pipelines, against the package's own optimizer on the whole model."""
    import torch
    from bitsandbytes.optim import AdamW8bit
    from optimi import AdamW as KahanAdamW
    from schedulefree import AdamWScheduleFree
    from transformers import AutoModelForCausalLM

    settings = options(folder, "run", optimizer, gradient_accumulation_steps=2, eval_data=(), checkpoint=None)
    assert ranks(4).run(train_rank, settings) == [None] * 4
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": [p for p in model.parameters() if p.ndim < 2]}]
    made = {
        "adamw": lambda: torch.optim.AdamW(groups, lr=1e-3, eps=1e-4, weight_decay=0.0),
        "adamw_8bit": lambda: AdamW8bit(groups, lr=1e-3, eps=1e-4, weight_decay=0.0),
        "adamw_kahan": lambda: KahanAdamW(groups, lr=1e-3, eps=1e-4, betas=(0.9, 0.999), weight_decay=0.0),
        "schedule_free": lambda: AdamWScheduleFree(groups, lr=1e-3, eps=1e-4, weight_decay=0.0),
        "sgd": lambda: torch.optim.SGD(groups, lr=1e-3, weight_decay=0.0),
    }
    if optimizer == "muon":
        inside = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
        parts: list[Any] = [
            torch.optim.Muon(inside, lr=1e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW([model.model.embed_tokens.weight], lr=1e-3, eps=1e-4, weight_decay=0.01),
            torch.optim.AdamW(groups[1]["params"], lr=1e-3, eps=1e-4, weight_decay=0.0),
        ]
        reference: Any = Together(parts)
    else:
        reference = made[optimizer]()
    if optimizer == "schedule_free":
        reference.train()
    batches = batches_in_order(folder / "data", steps=STEPS, global_batch=4, seed=7)
    losses, _ = train_model(model, batches, options={"gradient_clipping": 1.0}, optimizer=reference)
    if optimizer == "schedule_free":
        reference.eval()
    # 8 bits of state turn rounding into other codes, and torch's Muon iterates in bf16 whatever it is given.
    rough = {"adamw_8bit": 1e-4, "muon": 1e-4}.get(optimizer, 1e-6)
    np.testing.assert_allclose([record["loss"] for record in records(folder / "run/log")], losses, rtol=rough)
    expected = model.state_dict()
    for name, value in weights(folder / "run").items():
        np.testing.assert_allclose(value, expected[name], atol=max(1e-5, 10 * rough), err_msg=name)


class Together:
    """Several optimizers as one."""

    def __init__(self, parts: list[Any]) -> None:
        self._parts = parts

    def zero_grad(self) -> None:
        for part in self._parts:
            part.zero_grad()

    def step(self) -> None:
        for part in self._parts:
            part.step()


def test_a_checkpoint_of_schedule_free_is_exported_averaged(ranks: Callable[[int], Ranks], folder: Path) -> None:
    """What `--from_ckpt` converts, and what the run leaves, is the same average."""
    for precision in ("fp32", "bf16"):
        more = {"precision": precision, "eval_data": (), "checkpoint": folder / f"{precision}-ckpt"}
        assert ranks(2).run(train_rank, options(folder, precision, "schedule_free", **more)) == [None, None]
        given = {"from_ckpt": more["checkpoint"], "num_train_epochs": 0, "max_steps": None, "checkpoint": None}
        converted = options(folder, f"{precision}-c", "schedule_free", **more | given)
        assert ranks(2).run(train_rank, converted) == [None, None]
        left, again = weights(folder / precision), weights(folder / f"{precision}-c")
        for name, value in left.items():
            np.testing.assert_allclose(again[name].float(), value.float(), rtol=1e-6)


def test_rates_of_modules(ranks: Callable[[int], Ranks], folder: Path) -> None:
    """A rate of 0 leaves a module as it was; a pattern for another number of stages is the same."""
    from transformers import AutoModelForCausalLM

    more = {"module_learning_rate": ("mlp=0", "embed_tokens=1e-2"), "eval_data": (), "checkpoint": None}
    assert ranks(2).run(train_rank, options(folder, "two", "adamw", **more)) == [None, None]
    assert ranks(1).run(train_rank, options(folder, "one", "adamw", **more, pipe_parallel_size=1)) == [None]
    before = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    two, one = weights(folder / "two"), weights(folder / "one")
    for name, value in two.items():
        np.testing.assert_allclose(value, one[name], atol=1e-5, err_msg=name)
        assert bool((value == before[name]).all()) == ("mlp" in name), name
    moved = float((two["model.embed_tokens.weight"] - before["model.embed_tokens.weight"]).abs().max())
    assert moved > 5 * CONSTANT["learning_rate"]  # type: ignore[operator]
