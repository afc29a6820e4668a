"""A resumed run is the run that was never interrupted."""

import contextlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jllm.train.checkpoint.format import write_index
from tests.distributed.ranks import Ranks
from tests.distributed.runs import records, train_rank
from tests.fixtures import random_rows, tiny_llama, write_rows

STEPS = 7


def options_of(folder: Path, name: str, **more: Any) -> dict[str, Any]:
    return {
        "model": folder / "model",
        "train_data": (str(folder / "data"),),
        "eval_data": (str(folder / "eval"),),
        "precision": "fp32",
        "pipe_parallel_size": 2,
        "per_device_train_batch_size": 2,
        "global_batch_size": 8,
        "max_steps": STEPS,
        "num_warmup_steps": 2,
        "learning_rate": 1e-2,
        "steps_per_checkpoint": 3,
        "steps_per_eval": 2,
        "checkpoint": folder / name,
        "log_dir": folder / f"{name}-log",
        "partition_method": "uniform",
        **more,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    tiny_llama(folder / "model", tied=True)
    write_rows(folder / "data", random_rows(21, labels=True, packed=True), files=3)
    write_rows(folder / "eval", random_rows(5, seed=1), files=1)
    return folder


def train_each_saying(runs: list[dict[str, Any]], console: Path) -> list[str | None]:
    """Several runs, one after another; what the first process says of them is in `console`."""
    place = console if os.environ["RANK"] == "0" else Path(os.devnull)
    with place.open("w") as file, contextlib.redirect_stdout(file):
        return [train_rank(options) for options in runs]


def train_each(ranks: Callable[[int], Ranks], runs: list[dict[str, Any]], console: Path) -> list[str | None]:
    """The answers of two processes to these runs, which are the same."""
    one, other = ranks(2).run(train_each_saying, runs, console)
    assert one == other
    return list(one)


def going_on(console: Path) -> list[str]:
    """Where the runs of a console went on, and the first step of each."""
    lines = [line for line in console.read_text().splitlines() if line.startswith(("going on", "step "))]
    found = []
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith("going on"):
            found.append(f"{line.partition(' from ')[2]}: {' '.join(following.split()[:2])}")
    return found


def losses(folder: Path, name: str, key: str = "loss") -> list[tuple[int, float]]:
    return [(record["step"], record[key]) for record in records(folder / f"{name}-log", key)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resume_is_bit_identical(ranks: Callable[[int], Ranks], folder: Path, precision: str) -> None:
    straight, broken = f"straight-{precision}", f"broken-{precision}"
    group = ranks(4)
    assert group.run(train_rank, options_of(folder, straight, precision=precision)) == [None] * 4
    group.run(train_rank, options_of(folder, broken, precision=precision))
    for path in sorted((folder / broken).glob("step-*"))[1:]:
        shutil.rmtree(path)
    resumed = options_of(folder, broken, precision=precision, resume_ckpt="auto")
    console = folder / f"{broken}-console"
    assert group.run(train_each_saying, [resumed], console) == [[None]] * 4
    assert going_on(console) == [f"{folder / broken}/step-00000003 after step 3: step 4/{STEPS}"]
    assert losses(folder, broken) == losses(folder, straight)
    assert losses(folder, broken, "eval_loss") == losses(folder, straight, "eval_loss")
    assert [step for step, _ in losses(folder, straight)] == list(range(1, STEPS + 1))


def test_another_number_of_stages_and_pipelines(ranks: Callable[[int], Ranks], folder: Path) -> None:
    """The checkpoint of 2 x 2 goes on as 1 x 2 and as 3 x 1: the same samples, the same losses to 1e-5."""
    ranks(4).run(train_rank, options_of(folder, "two-by-two"))
    expected = losses(folder, "two-by-two")
    start = str(folder / "two-by-two/step-00000003")
    for world_size, pipe in ((2, 1), (3, 3)):
        name = f"world-{world_size}"
        more = {"pipe_parallel_size": pipe, "resume_ckpt": start, "checkpoint": None}
        assert ranks(world_size).run(train_rank, options_of(folder, name, **more)) == [None] * world_size
        found = losses(folder, name)
        assert [step for step, _ in found] == [4, 5, 6, 7]
        for (step, loss), (reference_step, reference) in zip(found, expected[3:], strict=True):
            assert step == reference_step
            assert abs(loss - reference) < 1e-5


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"learning_rate": 5e-3}, "--learning_rate"),
        ({"global_batch_size": 16}, "--global_batch_size"),
        ({"optimizer": "sgd"}, "--optimizer"),
        ({"seed": 3}, "--seed"),
        ({"target_modules": "mlp"}, "--target_modules"),
        ({"frozen_modules": "mlp"}, "--frozen_modules"),
        ({"layers_to_transform": "0:1"}, "--layers_to_transform"),
        ({"skip_train_steps": "8"}, "--skip_train_steps"),
    ],
)
def test_changed_settings_are_refused(
    ranks: Callable[[int], Ranks], folder: Path, change: dict[str, Any], named: str
) -> None:
    if not (folder / "base/step-00000003").exists():
        ranks(2).run(train_rank, options_of(folder, "base"))
    more = {"resume_ckpt": "auto", "max_steps": 9, **change}
    answers = ranks(2).run(train_rank, options_of(folder, "base", **more))
    assert all(answer is not None and answer.startswith(named) for answer in answers)


def test_changed_data_is_refused(ranks: Callable[[int], Ranks], folder: Path) -> None:
    if not (folder / "base/step-00000003").exists():
        ranks(2).run(train_rank, options_of(folder, "base"))
    write_rows(folder / "other", random_rows(21, labels=True, packed=True, seed=9), files=3)
    more = {"resume_ckpt": "auto", "max_steps": 9, "train_data": (str(folder / "other"),)}
    answers = ranks(2).run(train_rank, options_of(folder, "base", **more))
    assert all(answer is not None and "--train_data has changed" in answer for answer in answers)


def test_another_length_is_told_where_rates_depend_on_it(
    ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path
) -> None:
    for number, (warned, schedule) in enumerate(
        [
            (False, {"lr_scheduler_type": "constant_with_warmup"}),
            (True, {"lr_scheduler_type": "constant_with_warmup", "num_warmup_steps": 0.5}),
            (True, {"lr_scheduler_type": "cosine"}),
        ]
    ):
        runs = [
            options_of(folder, f"length-{number}", **schedule, resume_ckpt="auto", max_steps=steps) for steps in (2, 3)
        ]
        console = tmp_path / f"console-{number}"
        assert train_each(ranks, runs, console) == [None, None]
        assert ("warning: the checkpoint's run had 2 steps and this one has 3" in console.read_text()) == warned


def variant(folder: Path, name: str, **changes: Any) -> Path:
    """The model with another configuration."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(folder / "model")
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(5)
    LlamaForCausalLM(config).save_pretrained(folder / name)
    return folder / name


@pytest.mark.parametrize(
    ("changes", "named", "forced"),
    [
        ({"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}, "head_dim 4, that of {} had 8", None),
        (
            {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}},
            "rope_parameters.rope_theta 500.0, that of {} had 10000.0",
            None,
        ),
        (
            {"num_hidden_layers": 3},
            "num_hidden_layers 3, that of {} had 4",
            "model.layers.3.input_layernorm.weight has no place in --model: give the checkpoint of this model",
        ),
        (
            {"num_hidden_layers": 5},
            "num_hidden_layers 5, that of {} had 4",
            "model.layers.4.self_attn.q_proj.weight is missing; --model needs [32, 32]: give the checkpoint of this"
            " model",
        ),
        (
            {"hidden_size": 16},
            "hidden_size 16, that of {} had 32",
            "model.embed_tokens.weight is [97, 32]; --model needs [97, 16]: give the checkpoint of this model",
        ),
    ],
    ids=["heads", "rope", "fewer layers", "more layers", "narrower"],
)
def test_another_model_is_refused(
    ranks: Callable[[int], Ranks],
    folder: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    named: str,
    forced: str | None,
) -> None:
    """By name, and where shapes differ in spite of `--force_resume`: going on, starting anew and converting."""
    if not (folder / "base/step-00000003").exists():
        ranks(2).run(train_rank, options_of(folder, "base"))
    start = str(folder / "base/step-00000003")
    name = str(tmp_path.relative_to(folder.parent))
    model = {"model": variant(folder, f"model-{tmp_path.name}", **changes), "checkpoint": None}
    resume = options_of(folder, name, **model, resume_ckpt=start, log_dir=tmp_path / "log")
    begin = options_of(folder, name, **model, from_ckpt=Path(start), log_dir=tmp_path / "log-begin")
    convert = {**begin, "num_train_epochs": 0, "output_dir": tmp_path / "out"}
    gentle = [resume, begin, convert]
    answers = train_each(ranks, gentle, tmp_path / "console")
    options = ["--resume_ckpt", "--from_ckpt", "--from_ckpt"]
    for option, answer in zip(options, answers, strict=True):
        assert answer is not None
        assert answer.startswith("--model has " + named.format(option))
    assert not (tmp_path / "out").exists()
    answers = train_each(ranks, [{**each, "force_resume": True} for each in gentle], tmp_path / "console")
    assert answers == [None if forced is None else f"{start}: {forced}"] * 3
    assert (tmp_path / "out").exists() == (forced is None)


def test_the_same_model_in_another_place_goes_on(ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path) -> None:
    """Neither its path nor its dtype, nor settings that another version of transformers adds, make it another one."""
    if not (folder / "base/step-00000003").exists():
        ranks(2).run(train_rank, options_of(folder, "base"))
    shutil.copytree(folder / "model", tmp_path / "model")
    path = tmp_path / "model/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": "bfloat16", "use_cache": False}))
    shutil.copytree(folder / "base/step-00000003", tmp_path / "ckpt/step-00000003")
    index = tmp_path / "ckpt/step-00000003/index.json"
    saved = json.loads(index.read_text())
    saved["config"]["architecture"] |= {"transformers_version": "4.0.0", "gone_since": 3}
    write_index(index.parent, saved)
    more = {"model": tmp_path / "model", "resume_ckpt": "auto", "checkpoint": tmp_path / "ckpt"}
    options = options_of(folder, "elsewhere", **more)
    assert ranks(2).run(train_rank, options) == [None] * 2
    assert losses(folder, "elsewhere") == losses(folder, "base")[3:]


def test_an_optimizer_without_state_starts_afresh_or_is_refused(
    ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path
) -> None:
    """Another optimizer and more that trains, forced; a checkpoint that lost state; one before the first update."""

    def optimizer_steps(name: str) -> int:
        return int(json.loads((folder / name / f"step-{STEPS:08d}/index.json").read_text())["optimizer_steps"])

    console = tmp_path / "console"
    more = {"resume_ckpt": "auto", "eval_data": (), "force_resume": True}
    begun: dict[str, dict[str, Any]] = {
        f"{name}-{precision}": {"precision": precision, **change}
        for precision in ("fp32", "bf16")
        for name, change in (("sgd", {"optimizer": "sgd"}), ("mlp", {"target_modules": "mlp"}))
    }
    starts = [options_of(folder, name, eval_data=(), **given) for name, given in begun.items()]
    assert train_each(ranks, starts, console) == [None] * 4
    for name in begun:
        shutil.rmtree(folder / name / f"step-{STEPS:08d}")
    resumed = [options_of(folder, name, precision=given["precision"], **more) for name, given in begun.items()]
    assert train_each(ranks, resumed, console) == [None] * 4
    assert console.read_text().count("the optimizer's state starts afresh") == 4
    for name in begun:
        assert [step for step, _ in losses(folder, name)] == list(range(1, STEPS + 1))
        assert optimizer_steps(name) == STEPS - 6

    shutil.rmtree(folder / "mlp-fp32" / f"step-{STEPS:08d}")
    index = folder / "mlp-fp32/step-00000006/index.json"
    saved = json.loads(index.read_text())
    del saved["tensors"]["exp_avg/model.layers.3.mlp.up_proj.weight"]
    write_index(index.parent, saved)
    options = options_of(folder, "mlp-fp32", target_modules="mlp", resume_ckpt="auto")
    [answer] = train_each(ranks, [options], console)
    assert answer is not None
    assert answer.startswith(f"{index.parent} has no exp_avg of model.layers.3.mlp.up_proj.weight")

    unmoved = {"skip_train_steps": "1,2,3", "eval_data": ()}
    runs = [options_of(folder, name, **unmoved) for name in ("unmoved-straight", "unmoved")]
    assert train_each(ranks, runs, console) == [None] * 2
    for path in sorted((folder / "unmoved").glob("step-*"))[1:]:
        shutil.rmtree(path)
    assert train_each(ranks, [options_of(folder, "unmoved", **unmoved, resume_ckpt="auto")], console) == [None]
    assert losses(folder, "unmoved") == losses(folder, "unmoved-straight")


def test_a_run_that_lost_its_export_is_finished(ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path) -> None:
    """The same line again, after the last checkpoint: exported once more, but not where that is there already."""
    out, console = tmp_path / "out", tmp_path / "console"
    options = options_of(folder, "ended", output_dir=out, resume_ckpt="auto", eval_data=())
    assert train_each(ranks, [options], console) == [None]
    before = losses(folder, "ended")
    weights = {path.name: path.read_bytes() for path in out.glob("*.safetensors")}
    changed = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}

    assert train_each(ranks, [options], console) == [None]
    assert f"{out} is complete already: nothing is left to do\n" in console.read_text()
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == changed

    index = folder / f"ended/step-{STEPS:08d}/index.json"
    for lose in (lambda: shutil.rmtree(out), min(out.glob("*.safetensors")).unlink, index.touch):
        lose()
        assert train_each(ranks, [options], console) == [None]
        assert f"wrote {out}\n" in console.read_text()
        assert {path.name: path.read_bytes() for path in out.glob("*.safetensors")} == weights
    assert losses(folder, "ended") == before

    shorter = {**options, "max_steps": STEPS - 1, "force_resume": True}
    [named, beyond] = train_each(ranks, [{**options, "resume_ckpt": str(folder / "ended")}, shorter], console)
    for answer in (named, beyond):
        assert answer is not None
        assert "nothing is left to train" in answer
    assert train_each(ranks, [{**options, "output_dir": None}], console) == [None]
    assert "the run is complete: nothing is left to train\n" in console.read_text()


def test_auto_with_a_tag_is_refused(ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path) -> None:
    options = options_of(folder, "tagged", resume_ckpt="auto", tag="step-00000003")
    [answer] = train_each(ranks, [options], tmp_path / "console")
    assert answer is not None
    assert answer.startswith("--resume_ckpt auto takes the newest checkpoint, --tag step-00000003 that one; drop --tag")


def flip_a_bit(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 1 << place % 8
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["index.json", "rank-00000.safetensors", "rank-00001.safetensors"])
def test_a_damaged_newest_checkpoint_is_passed_over(
    ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path, name: str
) -> None:
    """`auto` says so and takes the one before; the losses are those of the undisturbed run."""
    if not (folder / "whole/step-00000003").exists():
        ranks(2).run(train_rank, options_of(folder, "whole", best_of=0))
    run = f"damaged-{name}"
    shutil.copytree(folder / "whole", folder / run)
    shutil.rmtree(folder / run / f"step-{STEPS:08d}")
    path = folder / run / "step-00000006" / name
    flip_a_bit(path, random.Random(name).randrange(path.stat().st_size))
    console = tmp_path / "console"
    assert train_each(ranks, [options_of(folder, run, resume_ckpt="auto")], console) == [None]
    said = console.read_text()
    assert f"warning: {path}: is damaged" in said or f"warning: {path}: cannot be read" in said
    assert going_on(console) == [f"{folder / run / 'step-00000003'} after step 3: step 4/{STEPS}"]
    assert losses(folder, run) == losses(folder, "whole")[3:]


def test_a_damaged_checkpoint_that_was_named_is_refused(
    ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path
) -> None:
    """The line names the newest good one, on every rank; where none is good it says so."""
    if not (folder / "whole/step-00000003").exists():
        ranks(2).run(train_rank, options_of(folder, "whole", best_of=0))
    shutil.copytree(folder / "whole", folder / "named")
    first, second, last = sorted((folder / "named").glob("step-*"))
    shutil.rmtree(last)
    flip_a_bit(second / "rank-00001.safetensors", -3)
    [answer] = train_each(ranks, [options_of(folder, "named", resume_ckpt=str(second))], tmp_path / "c")
    assert answer is not None
    assert answer.startswith(f"{second / 'rank-00001.safetensors'}: is damaged")
    assert answer.endswith(f"the newest good one is {first}")
    flip_a_bit(first / "rank-00000.safetensors", 100)
    [answer] = train_each(ranks, [options_of(folder, "named", resume_ckpt="auto")], tmp_path / "c")
    assert answer is not None
    assert answer.endswith("is known to be good; start over with --clean")
