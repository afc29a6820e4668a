"""Packed pairs in a pipeline are trained as padded, unpacked ones by plain transformers, however they are divided."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jllm.train.options.objective import PREFERENCE_LOSSES
from tests.data.pairs import Pair, pairs_of_row, random_pairs, write_pairs
from tests.distributed.ranks import Ranks
from tests.distributed.reference import batches_in_order
from tests.distributed.runs import options_of, records, train_rank, train_ranks
from tests.fixtures import tiny_llama

STEPS, RATE = 4, 0.05


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, pairs, and the same with references, in two files each."""
    folder = tmp_path_factory.mktemp("pairs")
    tiny_llama(folder / "model", tied=True)
    write_pairs(folder / "data", random_pairs(40, vocab=97, longest=8), length=52, per_file=9)
    answer = Ranks(1).run(train_rank, options_of(folder, write_ref_logps=folder / "ref", pipe_parallel_size=1))
    assert answer == [None]
    return folder


def steps_of(data: Path, global_batch: int, steps: int = STEPS) -> list[list[Pair]]:
    """The pairs of each step, by the rows alone."""
    batches = batches_in_order(data, steps=steps, global_batch=global_batch, seed=7)
    plain = [[{name: each.tolist() for name, each in row.items()} for row in rows] for rows in batches]
    return [[pair for row in rows for pair in pairs_of_row(row)] for rows in plain]


def run_options(folder: Path, out: Path, loss: str, **more: Any) -> dict[str, Any]:
    settings = {
        "train_data": (str(folder / "ref"),),
        "loss": loss,
        "optimizer": "sgd",
        "learning_rate": RATE,
        "gradient_clipping": 0.0,
        "lr_scheduler_type": "constant",
        "num_warmup_steps": 0,
        "seed": 7,
        "max_steps": STEPS,
        "output_dir": out,
    }
    return options_of(folder, settings, **more)


def assert_trained_alike(out: Path, folder: Path, batches: list[list[Pair]], **loss: Any) -> list[dict[str, Any]]:
    from tests.distributed.pairs_reference import train_on_pairs

    losses, norms, weights = train_on_pairs(folder / "model", batches, rate=RATE, **loss)
    found = records(out / "log")
    np.testing.assert_allclose([each["loss"] for each in found], losses, rtol=3e-6)
    np.testing.assert_allclose([each["grad_norm"] for each in found], norms, rtol=1e-4)
    for name, tensor in weights_of(out).items():
        np.testing.assert_allclose(tensor.numpy(), weights[name].numpy(), atol=3e-6, err_msg=name)
    assert [each["pairs"] for each in found] == [len(pairs) for pairs in batches]
    return found


LOSSES: dict[str, dict[str, Any]] = {
    "dpo": {"beta": 0.3},
    "ipo": {"beta": 0.7},
    "orpo": {"beta": 0.4},
    "simpo": {"beta": 1.5, "gamma": 0.3},
    "apo_zero": {"beta": 0.5},
    "apo_down": {"beta": 0.5, "ftx": 0.2},
}


@pytest.mark.parametrize("kind", PREFERENCE_LOSSES)
def test_every_loss_on_two_stages(ranks: Callable[[int], Ranks], tmp_path: Path, folder: Path, kind: str) -> None:
    """Of unequal micro-batches, 4 of one row a step."""
    given = LOSSES[kind]
    options = {"beta": given["beta"], "simpo_gamma": given.get("gamma"), "pref_ftx": given.get("ftx")}
    more = run_options(folder, tmp_path / "out", kind, gradient_accumulation_steps=4, **options)
    assert ranks(2).run(train_rank, more) == [None, None]
    batches = steps_of(folder / "ref", 4)
    assert len({len(pairs) for pairs in batches}) > 1
    assert_trained_alike(tmp_path / "out", folder, batches, kind=kind, **given)


LAYOUTS = {
    "one process, four rows": (1, {"pipe_parallel_size": 1, "per_device_train_batch_size": 4}),
    "fused": (1, {"pipe_parallel_size": 1, "per_device_train_batch_size": 4, "fused_loss": "on"}),
    "2 x 2": (4, {"gradient_accumulation_steps": 2}),
    "ZeRO-1, checkpointed": (2, {"pipe_parallel_size": 1, "gradient_accumulation_steps": 2, "zero_stage": 1,
                                 "checkpoint_grad_interval": 1}),
    "overlapped": (2, {"gradient_accumulation_steps": 4, "schedule": "overlapped"}),
    "slices": (2, {"pipe_parallel_size": 1, "model_parallel_size": 2, "per_device_train_batch_size": 4}),
    "2 stages x 2 slices": (4, {"model_parallel_size": 2, "gradient_accumulation_steps": 4}),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(ranks: Callable[[int], Ranks], tmp_path: Path, folder: Path, layout: str) -> None:
    """Steps of four rows, whatever the micro-batches and pipelines; smoothed DPO."""
    world, more = LAYOUTS[layout]
    options = run_options(folder, tmp_path / "out", "dpo", label_smoothing=0.1, pref_ftx=0.5, **more)
    assert ranks(world).run(train_rank, options) == [None] * world
    loss = {"kind": "dpo", "beta": 0.1, "smoothing": 0.1, "ftx": 0.5}
    found = assert_trained_alike(tmp_path / "out", folder, steps_of(folder / "ref", 4), **loss)
    assert found[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)


LORA = {"lora_dim": 4, "lora_target_modules": "q_proj,v_proj,down_proj", "optimizer": "adamw", "learning_rate": 5e-3}
ULYSSES = {"sequence_parallel_size": 2, "sequence_parallel_mode": "ulysses"}
BALANCED = {"sequence_parallel_size": 2, "sequence_parallel_mode": "balanced"}
ONE_STAGE = {"pipe_parallel_size": 1}
SHARED: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        **dict(zip(PREFERENCE_LOSSES, 3 * (ULYSSES, BALANCED), strict=True)),
        "lora": {**ULYSSES, "fused_loss": "on"},
        "padded": BALANCED,
    },
    4: {
        "lora, pp2 x sp2": {**BALANCED, "pipe_parallel_size": 2, "schedule": "overlapped"},
        "ipo, dp2 x sp2": {**BALANCED, "zero_stage": 1, "gradient_accumulation_steps": 1},
        "dpo, tp2 x sp2": {**ULYSSES, "model_parallel_size": 2},
        "simpo, sp4": {**BALANCED, "sequence_parallel_size": 4, "checkpoint_grad_interval": 1},
    },
}
"""Runs by the number of processes: of one of the kinds of `options_of_kind`, and how rows are shared."""


def options_of_kind(folder: Path, tmp_path: Path, kind: str) -> dict[str, Any]:
    """Of runs with steps of several micro-batches, whose rows have unlike numbers of pairs."""
    more = {**ONE_STAGE, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_steps": 3}
    if kind == "dpo":
        evaluated = {"eval_data": (f"all={folder / 'ref'}",), "steps_per_eval": 3}
        return {"label_smoothing": 0.1, "pref_ftx": 0.5, **more, **evaluated}
    if kind == "lora":
        data = str(folder / "data")
        given = {**LORA, "optimizer": "sgd", "learning_rate": 0.5, "train_data": (data,), "eval_data": (data,)}
        return {"steps_per_eval": 3, **more, **given}
    if kind == "padded":
        more |= {"batch_size_tokens": 192, "per_device_train_batch_size": 1}
        return {"train_data": (str(tmp_path / "padded"),), **more, "max_steps": 2}
    given = LOSSES[kind]
    options = {"beta": given["beta"], "simpo_gamma": given.get("gamma"), "pref_ftx": given.get("ftx")}
    return {**options, **more}


def test_shared_rows(ranks: Callable[[int], Ranks], tmp_path: Path, folder: Path) -> None:
    """A side's tokens lie on several processes: losses, norms, weights and records are those of whole rows."""
    write_pairs(tmp_path / "pairs", random_pairs(30, vocab=97, longest=8), length=52, pad=True)
    write = {"write_ref_logps": tmp_path / "padded", "train_data": (str(tmp_path / "pairs"),), **ONE_STAGE}
    kinds = [*PREFERENCE_LOSSES, "lora", "padded"]

    def run_of(name: str, kind: str, more: dict[str, Any]) -> dict[str, Any]:
        loss = kind if kind in PREFERENCE_LOSSES else "dpo"
        return run_options(folder, tmp_path / name, loss, **options_of_kind(folder, tmp_path, kind) | more)

    alone = [run_of(f"one {kind}", kind, {}) for kind in kinds]
    assert ranks(1).run(train_ranks, [options_of(folder, write), *alone]) == [[None] * (1 + len(kinds))]
    for count, layouts in SHARED.items():
        runs = [run_of(name, name.split(",")[0], more) for name, more in layouts.items()]
        assert ranks(count).run(train_ranks, runs) == [[None] * len(runs)] * count
        for name in layouts:
            assert_alike(tmp_path / name, tmp_path / f"one {name.split(',')[0]}")


def assert_alike(out: Path, one: Path) -> None:
    """A run has the numbers of pairs, the losses and the weights of another one."""
    for key in ("loss", "eval_loss"):
        found, expected = (records(each / "log", key) for each in (out, one))
        assert len(found) == len(expected)
        for mine, theirs in zip(found, expected, strict=True):
            names = [name for name in theirs if "/" in name or name in ("pairs", "loss", "eval_loss", "eval_pairs")]
            assert len(names) > 7
            if abs(theirs["rewards/margins"]) < 1e-5:  # rewards are 0 but for rounding, which decides who is right
                names.remove("rewards/accuracies")
            at = f"{out.name}, step {mine['step']}"
            np.testing.assert_allclose([mine[k] for k in names], [theirs[k] for k in names], atol=1e-5, err_msg=at)
            if key == "loss":
                assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5), at
    weights, expected_weights = weights_of(out), weights_of(one)
    assert weights.keys() == expected_weights.keys()
    for name, tensor in expected_weights.items():
        np.testing.assert_allclose(weights[name].numpy(), tensor.numpy(), atol=2e-6, err_msg=f"{out.name}: {name}")


def weights_of(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    found = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert found
    return found


def test_the_first_step_of_dpo(ranks: Callable[[int], Ranks], tmp_path: Path, folder: Path) -> None:
    """From the reference itself: ln 2, and no margins; then they rise. Evaluations tell the same."""
    evaluated = {"eval_data": (f"all={folder / 'ref'}",), "steps_per_eval": 4}
    options = run_options(folder, tmp_path / "out", "dpo", gradient_accumulation_steps=4, **evaluated)
    assert ranks(2).run(train_rank, options) == [None, None]
    first = records(tmp_path / "out/log")[0]
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-5)
    for name in ("chosen", "rejected", "margins"):
        assert first[f"rewards/{name}"] == pytest.approx(0, abs=1e-5)
    before, after = records(tmp_path / "out/log", "eval_loss")
    assert before["eval_loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert before["eval_pairs"] == after["eval_pairs"] == 40
    assert after["rewards/margins"] > 0
    assert after["rewards/margins"] == pytest.approx(after["rewards/chosen"] - after["rewards/rejected"])
    assert after["rewards/accuracies"] > 0.5
    assert after["logps/chosen"] < 0


@pytest.mark.parametrize(("stages", "slices"), [(1, 1), (2, 1), (1, 2)])
def test_lora_is_its_own_reference(
    ranks: Callable[[int], Ranks], tmp_path: Path, folder: Path, stages: int, slices: int
) -> None:
    """Adapters and dropout off: the same losses as with references that the base model wrote."""
    layout = {"pipe_parallel_size": stages, "model_parallel_size": slices}
    more = {**LORA, **layout, "gradient_accumulation_steps": 2, "output_dir": None}
    evaluated = {"eval_data": (f"all={folder / 'data'}",), "steps_per_eval": 4}
    own = run_options(
        folder, tmp_path, "dpo", **more, **evaluated, train_data=(str(folder / "data"),), log_dir=tmp_path / "own"
    )
    world = stages * slices
    assert ranks(world).run(train_rank, own) == [None] * world
    # The order of rows depends on the files, so both are read as they are.
    written = run_options(folder, tmp_path, "dpo", **more, log_dir=tmp_path / "written", no_shuf=True)
    assert ranks(world).run(train_rank, written) == [None] * world
    again = {**own, "no_shuf": True, "log_dir": tmp_path / "again", "eval_data": ()}
    assert ranks(world).run(train_rank, again) == [None] * world
    found = records(tmp_path / "again")
    assert found[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert found[-1]["loss"] != pytest.approx(np.log(2), abs=1e-4)
    for one, other in zip(found, records(tmp_path / "written"), strict=True):
        for name in ("loss", "rewards/margins", "logps/chosen"):
            assert one[name] == pytest.approx(other[name], abs=2e-5), (one["step"], name)
    before, after = records(tmp_path / "own", "eval_loss")
    assert before["eval_loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert after["rewards/margins"] > 0


@pytest.mark.parametrize("way", ["whole", "lora"])
def test_going_on_is_bit_identical(ranks: Callable[[int], Ranks], tmp_path: Path, folder: Path, way: str) -> None:
    more = dict(LORA, train_data=(str(folder / "data"),)) if way == "lora" else {}
    more |= {"gradient_accumulation_steps": 2, "output_dir": None, "max_steps": 6}
    whole = run_options(folder, tmp_path, "dpo", **more, checkpoint=tmp_path / "ckpt", steps_per_checkpoint=3)
    assert ranks(2).run(train_rank, whole) == [None, None]
    again = run_options(
        folder, tmp_path, "dpo", **more, resume_ckpt=str(tmp_path / "ckpt/step-00000003"), log_dir=tmp_path / "log"
    )
    assert ranks(2).run(train_rank, again) == [None, None]
    expected = {record["step"]: record for record in records(tmp_path / "ckpt/log")}
    found = records(tmp_path / "log")
    assert [record["step"] for record in found] == [4, 5, 6]
    for record in found:
        for name in ("loss", "grad_norm", "rewards/margins", "logps/rejected"):
            assert record[name] == expected[record["step"]][name]


def test_tokens_for_a_budget_and_padded_rows(ranks: Callable[[int], Ranks], tmp_path: Path, folder: Path) -> None:
    """Rows that are joined, and whose padding goes, still have pairs side by side."""
    write_pairs(tmp_path / "data", random_pairs(40, vocab=97, longest=8), length=52, pad=True)
    answer = ranks(2).run(train_rank, options_of(folder, write_ref_logps=tmp_path / "ref",
                                                 train_data=(str(tmp_path / "data"),)))  # fmt: skip
    assert answer == [None, None]
    options = run_options(
        folder, tmp_path / "out", "dpo", train_data=(str(tmp_path / "ref"),), batch_size_tokens=192, max_steps=3,
        gradient_accumulation_steps=2, per_device_train_batch_size=1,
    )  # fmt: skip
    assert ranks(2).run(train_rank, options) == [None, None]
    first, *others = records(tmp_path / "out/log")
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert first["pairs"] > 4
    # The order is that of these very references, whose last bits are the machine's: no single step's share is known.
    assert np.mean([each["filled"] for each in (first, *others)]) > 0.5


def test_orpo_learns_without_a_reference(ranks: Callable[[int], Ranks], tmp_path: Path, folder: Path) -> None:
    options = run_options(
        folder, tmp_path, "orpo", train_data=(str(folder / "data"),), optimizer="adamw", learning_rate=3e-3,
        per_device_train_batch_size=16, pipe_parallel_size=1, max_steps=12, output_dir=None, log_dir=tmp_path / "log",
    )  # fmt: skip
    assert ranks(1).run(train_rank, options) == [None]
    found = records(tmp_path / "log")
    assert found[-1]["loss"] < 0.8 * found[0]["loss"]
    assert found[-1]["rewards/margins"] > found[0]["rewards/margins"]


def test_qlora_too(ranks: Callable[[int], Ranks], tmp_path: Path, folder: Path) -> None:
    """In 4 bits the reference is the model in 4 bits, written before or made on the way; another one is refused."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install .[adapters]")
    given = {**LORA, "load_in_4bit": True, "output_dir": None, "no_shuf": True, "checkpoint_grad_interval": 1}
    write = {"write_ref_logps": tmp_path / "ref", "lora_dim": 4, "load_in_4bit": True, "pipe_parallel_size": 1}
    assert ranks(1).run(train_rank, options_of(folder, write)) == [None]
    for name, data in (("own", folder / "data"), ("written", tmp_path / "ref")):
        options = run_options(folder, tmp_path, "dpo", **given, train_data=(str(data),), log_dir=tmp_path / name)
        assert ranks(2).run(train_rank, options) == [None, None]
    for one, other in zip(records(tmp_path / "own"), records(tmp_path / "written"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=2e-5)
        assert one["rewards/margins"] == pytest.approx(other["rewards/margins"], abs=2e-5)
    options = run_options(folder, tmp_path, "dpo", **given, log_dir=tmp_path / "no")
    answers = ranks(2).run(train_rank, options)
    assert "were made with --precision fp32, and this run has fp32, load_in_4bit" in answers[0]


@pytest.mark.skipif(int(os.environ.get("JLLM_TEST_SIZE", "1")) < 2, reason="compiles for a minute; JLLM_TEST_SIZE=2")
def test_compiled(ranks: Callable[[int], Ranks], tmp_path: Path, folder: Path) -> None:
    """Compiled layers, with and without adapters on."""
    for name, more in (("plain", {}), ("compiled", {"compile": "on"})):
        options = run_options(folder, tmp_path, "dpo", **LORA, **more, train_data=(str(folder / "data"),),
                              pipe_parallel_size=1, output_dir=None, log_dir=tmp_path / name)  # fmt: skip
        assert ranks(1).run(train_rank, options) == [None]
    for one, other in zip(records(tmp_path / "plain"), records(tmp_path / "compiled"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=2e-5)
