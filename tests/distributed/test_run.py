"""A run's evaluations, checkpoints, endings and records."""

import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jllm.data.dataset.manifest import open_data_set, write_manifest
from tests.distributed.ranks import Ranks
from tests.distributed.runs import logged_options, records, train_rank, train_rank_into
from tests.fixtures import random_rows, tiny_llama, write_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    tiny_llama(folder / "model", tied=True)
    write_rows(folder / "data", random_rows(24), files=2)
    write_rows(folder / "eval", random_rows(7, seed=1))
    write_rows(folder / "one-row", random_rows(1, seed=2))
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def test_evaluation_is_exact_and_complete(ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path) -> None:
    """Every row counts once, in sets of any size, whatever the batch: loss and accuracy equal plain transformers'."""
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import AutoModelForCausalLM

    more = {
        "eval_data": (str(folder / "eval"), f"tiny={folder / 'one-row'}"),
        "learning_rate": 0.0,
        "max_steps": 2,
        "steps_per_eval": 1.0,
    }
    assert ranks(4).run(train_rank, logged_options(folder, tmp_path, **more)) == [None] * 4
    found = records(tmp_path / "log", "eval_loss")
    assert [(record["step"], record["name"]) for record in found] == [
        (step, name) for step in range(3) for name in ("eval", "tiny")
    ]
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    for name, rows in (("eval", random_rows(7, seed=1)), ("tiny", random_rows(1, seed=2))):
        total = correct = tokens = 0.0
        for row in rows:
            ids = torch.tensor(row["input_ids"])
            with torch.no_grad():
                logits = model(ids[None, :-1]).logits[0]
            total += float(cross_entropy(logits, ids[1:], reduction="sum"))
            correct += float((logits.argmax(-1) == ids[1:]).sum())
            tokens += len(ids) - 1
        for record in found:
            if record["name"] == name:
                assert record["eval_tokens"] == tokens
                assert abs(record["eval_loss"] - total / tokens) < 1e-5
                assert abs(record["accuracy"] - correct / tokens) < 1e-9


@pytest.mark.parametrize("executor", ["process", "thread", "none"])
def test_retention_and_cadence(ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path, executor: str) -> None:
    """24 rows, 4 a step: 6 steps an epoch."""
    more = {
        "num_train_epochs": 2,
        "checkpoint": tmp_path / "ckpt",
        "steps_per_checkpoint": 2,
        "background_executor": executor,
        "clean": True,
    }
    for change, expected in (
        ({"max_num_checkpoints": 2}, [10, 12]),
        ({"ckpt_step_gt": 7}, [8, 10, 12]),
        ({"ckpt_epoch": "1"}, [2, 4, 6]),
        ({"skip_epoch": "1"}, [8, 10, 12]),
        ({"steps_per_checkpoint": 0}, [6, 12]),
        ({"steps_per_checkpoint": 5}, [5, 10, 12]),
    )[:: 1 if executor == "process" else 3]:
        shutil.rmtree(tmp_path / "ckpt", ignore_errors=True)
        assert ranks(2).run(train_rank, logged_options(folder, tmp_path, **{**more, **change})) == [None] * 2
        assert names(tmp_path / "ckpt") == [f"step-{step:08d}" for step in expected], change


def test_best_of_keeps_the_best(ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path) -> None:
    more = {"max_steps": 8, "steps_per_checkpoint": 1, "steps_per_eval": 1.0, "best_of": 2, "learning_rate": 3e-2}
    more |= {"checkpoint": tmp_path / "ckpt", "eval_data": (str(folder / "eval"),)}
    assert ranks(2).run(train_rank, logged_options(folder, tmp_path, **more)) == [None] * 2
    losses = {r["step"]: r["eval_loss"] for r in records(tmp_path / "log", "eval_loss") if r["step"]}
    best = sorted(losses, key=lambda step: losses[step])[:2]
    assert max(best) < 8, "the newest is among the best, which shows nothing"
    assert names(tmp_path / "ckpt") == [f"step-{step:08d}" for step in [*sorted(best), 8]]


def test_early_stop(ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path) -> None:
    """Training on one set hurts on random other text sooner or later; the run stops after two rebounds in a row."""
    more = {"max_steps": 200, "steps_per_eval": 1.0, "early_stop": 2, "learning_rate": 5e-2}
    more |= {"eval_data": (str(folder / "eval"),)}
    assert ranks(2).run(train_rank, logged_options(folder, tmp_path, **more)) == [None] * 2
    losses = [record["eval_loss"] for record in records(tmp_path / "log", "eval_loss")]
    assert len(losses) < 200
    rises = [later > earlier for earlier, later in itertools.pairwise(losses)]
    assert rises[-2:] == [True, True]
    assert not any(first and second for first, second in list(itertools.pairwise(rises))[:-1])


def test_save_and_save_quit_files(ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path) -> None:
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt/save_quit").touch()
    more = {"max_steps": 50, "checkpoint": tmp_path / "ckpt"}
    assert ranks(2).run(train_rank, logged_options(folder, tmp_path, **more)) == [None] * 2
    assert names(tmp_path / "ckpt") == ["step-00000001"]
    assert not (tmp_path / "ckpt/save_quit").exists()
    (tmp_path / "ckpt/save").touch()
    more = {**more, "max_steps": 50, "resume_ckpt": "auto", "ckpt_step_gt": 49}
    assert ranks(2).run(train_rank, logged_options(folder, tmp_path, **more)) == [None] * 2
    assert names(tmp_path / "ckpt") == ["step-00000001", "step-00000002", "step-00000050"]


@pytest.mark.parametrize("executor", ["process", "thread", "none"])
def test_model_only_checkpoints_load(
    ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path, executor: str
) -> None:
    """Two stages, two pipelines: the newest checkpoint is the exported model, while training would go on."""
    import torch
    from transformers import AutoModelForCausalLM

    more = {"max_steps": 4, "steps_per_checkpoint": 2, "only_ckpt_model": True, "checkpoint": tmp_path / "ckpt"}
    more |= {"background_executor": executor, "output_dir": tmp_path / "out", "gradient_accumulation_steps": 2}
    assert ranks(4).run(train_rank, logged_options(folder, tmp_path, **more)) == [None] * 4
    assert names(tmp_path / "ckpt") == ["step-00000002", "step-00000004"]
    assert not list((tmp_path / "ckpt").rglob(".*"))
    folders = [*sorted((tmp_path / "ckpt").glob("step-*")), tmp_path / "out"]
    first, last, exported = (AutoModelForCausalLM.from_pretrained(each).state_dict() for each in folders)
    assert all(torch.equal(last[name], exported[name]) for name in exported)
    assert not all(torch.equal(first[name], exported[name]) for name in exported)


def test_skipped_steps_leave_the_weights(ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    more = {"max_steps": 4, "skip_train_steps": "3,4", "output_dir": tmp_path / "out", "lr_scheduler_type": "constant"}
    assert ranks(2).run(train_rank, logged_options(folder, tmp_path, **more)) == [None] * 2
    [*_trained, third, fourth] = records(tmp_path / "log")
    assert [record["loss"] for record in (third, fourth)] == [None, None]
    assert fourth["consumed_rows"] == 16
    shorter = {**more, "max_steps": 2, "output_dir": tmp_path / "short", "log_dir": tmp_path / "short-log"}
    assert ranks(2).run(train_rank, logged_options(folder, tmp_path, **shorter)) == [None] * 2
    for path in (tmp_path / "out").glob("*.safetensors"):
        other = load_file(tmp_path / "short" / path.name)
        assert all((tensor == other[name]).all() for name, tensor in load_file(path).items())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nan_never_reaches_the_weights(
    ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path, precision: str
) -> None:
    """A model whose head overflows: with `skip` the weights stay, with `stop` the run ends and says where."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder / "model", tmp_path / "model")
    weights = load_file(tmp_path / "model/model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], 3e38)
    save_file(weights, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    more = {"model": tmp_path / "model", "max_steps": 2, "precision": precision}
    answers = ranks(2).run(train_rank, logged_options(folder, tmp_path, **more))
    assert all(answer is not None and answer.startswith("step 1: loss") for answer in answers)
    more |= {"on_nan": "skip", "output_dir": tmp_path / "out", "clean": True}
    assert ranks(2).run(train_rank, logged_options(folder, tmp_path, **more)) == [None] * 2
    for path in (tmp_path / "out").glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            expected = weights[name].bfloat16().float() if precision == "bf16" else weights[name]
            assert torch.equal(tensor, expected), name


def test_stage_without_anything_to_train(ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    before = load_file(folder / "model/model.safetensors")
    for precision in ("fp32", "bf16"):
        out = tmp_path / precision
        more = {"max_steps": 2, "output_dir": out, "target_modules": "layers.3", "precision": precision}
        more |= {"clean": True}
        more |= {"learning_rate": 1.0, "gradient_clipping": 0.0, "optimizer": "sgd"}  # every weight moves, in bf16 too
        assert ranks(2).run(train_rank, logged_options(folder, tmp_path, **more)) == [None] * 2
        after: dict[str, Any] = {}
        for path in out.glob("*.safetensors"):
            after |= load_file(path)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        changed = {name for name, tensor in after.items() if not (tensor == before[name].to(dtype)).all()}
        assert changed == {name for name in before if ".layers.3." in name}


@pytest.mark.parametrize("only_model", [False, True])
def test_the_template_of_the_data_is_exported(
    ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path, only_model: bool
) -> None:
    """Where the model has none, at the end and in `--only_ckpt_model` folders; named templates of the model always."""
    for name in ("model", "data"):
        shutil.copytree(folder / name, tmp_path / name)
    manifest = open_data_set(tmp_path / "data").manifest
    write_manifest(tmp_path / "data", dataclasses.replace(manifest, chat_template="{{ data }}"))
    more: dict[str, Any] = {"model": tmp_path / "model", "train_data": (str(tmp_path / "data"),), "max_steps": 1}
    more["output_dir"] = tmp_path / "out"
    if only_model:
        more |= {"only_ckpt_model": True, "checkpoint": tmp_path / "ckpt", "steps_per_checkpoint": 1.0}
    assert ranks(2).run(train_rank, logged_options(folder, tmp_path, **more)) == [None] * 2
    written = [
        tmp_path / "out",
        *(tmp_path / "ckpt" / name for name in (names(tmp_path / "ckpt") if only_model else [])),
    ]
    assert len(written) == 1 + only_model
    for out in written:
        assert (out / "chat_template.jinja").read_text() == "{{ data }}"
    (tmp_path / "model/additional_chat_templates").mkdir()
    (tmp_path / "model/additional_chat_templates/rag.jinja").write_text("{{ rag }}")
    (tmp_path / "out/chat_template.jinja").unlink()
    for number in range(2):  # the second time into a folder that has them
        more = {**more, "only_ckpt_model": False, "checkpoint": None, "log_dir": tmp_path / f"log-{number}"}
        assert ranks(2).run(train_rank, logged_options(folder, tmp_path, **more)) == [None] * 2
        assert (tmp_path / "out/additional_chat_templates/rag.jinja").read_text() == "{{ rag }}"
        assert not (tmp_path / "out/chat_template.jinja").exists()


def test_the_template_of_the_data_is_in_checkpoints_unless_there_are_several(
    ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path
) -> None:
    """What is exported of a checkpoint has it; where sets differ, none is taken, and a line says so once."""
    for name in ("one", "other"):
        shutil.copytree(folder / "data", tmp_path / name)
        manifest = open_data_set(tmp_path / name).manifest
        write_manifest(tmp_path / name, dataclasses.replace(manifest, chat_template=f"{{{{ {name} }}}}"))
    given = {"one": ("one",), "both": ("one", "other")}
    for name, sets in given.items():
        more: dict[str, Any] = {"train_data": tuple(str(tmp_path / each) for each in sets), "max_steps": 1}
        more["checkpoint"] = tmp_path / f"checkpoint-{name}"
        console, out = tmp_path / f"console-{name}", tmp_path / f"out-{name}"
        assert ranks(2).run(train_rank_into, logged_options(folder, tmp_path / name, **more), console) == [None] * 2
        assert console.read_text().count("were made with different chat templates") == (name == "both")
        convert = {**more, "num_train_epochs": 0, "max_steps": None, "checkpoint": None, "output_dir": out}
        convert |= {"train_data": (), "from_ckpt": tmp_path / f"checkpoint-{name}"}
        assert ranks(2).run(train_rank, logged_options(folder, tmp_path / f"{name}-again", **convert)) == [None] * 2
        template = out / "chat_template.jinja"
        assert (template.read_text() if template.exists() else None) == ("{{ one }}" if name == "one" else None)


def test_dry_run(folder: Path, tmp_path: Path) -> None:
    import subprocess
    import sys

    arguments = ["--model", "model", "--train_data", "data", "--pipe_parallel_size", "2", "--dry_run"]
    command = [sys.executable, "-m", "jllm.train_pipe", *arguments, "--output_dir", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    options = done.stdout[done.stdout.index("{\n") : done.stdout.index("\n}\n") + 2]
    assert json.loads(options)["pipe_parallel_size"] == 2
    assert "24 rows" in done.stdout
    assert "bubble" in done.stdout
    assert not (tmp_path / "out").exists()


def test_early_stop_counts_on_after_a_resume(ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path) -> None:
    """A rebound before a checkpoint and one after it are two in a row."""
    # The more of one token is seen, the worse another one is predicted: the loss rises with every step.
    seen, other = ([{"input_ids": [token] * 20}] * 24 for token in (3, 5))
    data = {"train_data": (str(write_rows(tmp_path / "seen", seen)),)}
    data["eval_data"] = (str(write_rows(tmp_path / "other", other)),)
    rising = {**data, "steps_per_eval": 1.0, "learning_rate": 0.05, "early_stop": 2}
    more = {**rising, "checkpoint": tmp_path / "ckpt", "steps_per_checkpoint": 1, "resume_ckpt": "auto"}
    straight = {**rising, "max_steps": 9, "lr_scheduler_type": "constant", "log_dir": tmp_path / "straight"}
    assert ranks(2).run(train_rank, logged_options(folder, tmp_path, **straight)) == [None] * 2
    ended = records(tmp_path / "straight")[-1]["step"]
    losses = [record["eval_loss"] for record in records(tmp_path / "straight", "eval_loss")]
    assert losses[-1] > losses[-2] > losses[-3]
    for last in (ended - 1, 9):
        given = {**more, "max_steps": last, "lr_scheduler_type": "constant"}
        assert ranks(2).run(train_rank, logged_options(folder, tmp_path, **given)) == [None] * 2
    assert records(tmp_path / "log")[-1]["step"] == ended


def test_clean_starts_over(ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path) -> None:
    out, ckpt = tmp_path / "out", tmp_path / "ckpt"
    for each in (out, ckpt):
        each.mkdir()
        (each / "marker").touch()
    more = {"output_dir": out, "checkpoint": ckpt, "max_steps": 1}
    assert ranks(2).run(train_rank, logged_options(folder, tmp_path, **more)) == [None] * 2
    assert (out / "marker").exists()
    assert ranks(2).run(train_rank, logged_options(folder, tmp_path, **more, clean=True)) == [None] * 2
    assert not (out / "marker").exists()
    assert not (ckpt / "marker").exists()
    assert (out / "config.json").exists()
    for answer in ranks(2).run(
        train_rank, logged_options(folder, tmp_path, **{**more, "output_dir": folder}, clean=True)
    ):
        assert answer is not None
        assert answer.startswith(f"--clean would remove {folder}, which holds {folder / 'data'}")
    assert (folder / "data/_manifest.json").exists()


def test_large_evaluations_are_announced(ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path) -> None:
    more = {"eval_data": (str(folder / "eval"),), "max_steps": 30, "pipe_parallel_size": 1, "clean": True}
    for steps_per_eval, announced in ((1.0, True), (30.0, False)):
        options = logged_options(folder, tmp_path, **more, steps_per_eval=steps_per_eval)
        assert ranks(1).run(train_rank_into, options, tmp_path / "console") == [None]
        # An evaluation of 7 rows costs a third of training on them; a step is 4 rows.
        assert ("warning: evaluation takes about" in (tmp_path / "console").read_text()) == announced
