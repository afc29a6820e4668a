"""`--dry_run` says no to what a run refuses, with the run's own line, and yes to what works, without doing it."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jllm.errors import UserError
from jllm.train.config import TrainConfig
from tests.distributed.ranks import Ranks
from tests.distributed.runs import fp16_works, records, train_rank
from tests.fixtures import VOCABULARY, random_rows, tiny_llama, write_rows
from tests.models.family_check import make_folder
from tests.models.tiny import tiny_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, models, and a run that has ended after step 2 of 2."""
    folder = tmp_path_factory.mktemp("dry")
    tiny_llama(folder / "model", tied=True)
    tiny_llama(folder / "deep", tied=True, layers=5)
    tiny_llama(folder / "untied", tied=False)
    write_rows(folder / "beyond", [{"input_ids": [1, VOCABULARY, 2]}] * 24)
    shutil.copytree(folder / "model", folder / "fp8")
    config = json.loads((folder / "model/config.json").read_text())
    quantised = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "fp8/config.json").write_text(json.dumps({**config, "quantization_config": quantised}))
    write_rows(folder / "data", random_rows(24), files=2)
    write_rows(folder / "bare", random_rows(24), manifest=False)
    write_rows(folder / "many", random_rows(24) * 400, files=2)
    write_rows(folder / "many-bare", random_rows(24) * 400, manifest=False)
    write_rows(folder / "masked", [{"input_ids": [1, 2, 3], "labels": [-100] * 3}] * 3)
    (folder / "text.jsonl").write_text('{"text": "one"}\n')
    (folder / "picture.png").touch()
    (folder / "other.json").write_text('{"gradient_clipping": 3}')
    assert Ranks(1).run(train_rank, options_of(folder, checkpoint=folder / "run", max_steps=2)) == [None]
    return folder


def options_of(folder: Path, **more: Any) -> dict[str, Any]:
    return {"model": folder / "model", "train_data": (str(folder / "data"),), "precision": "fp32", **more}


FP16 = "--precision fp16"
MISTAKES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "no such folder": lambda folder: {"eval_data": (str(folder / "nothere"),)},
    "no token of": lambda folder: {"eval_data": (f"m={folder / 'masked'}",)},
    "no complete checkpoint": lambda folder: {"resume_ckpt": str(folder / "nope")},
    "--train_data has changed": lambda folder: {
        "resume_ckpt": str(folder / "run"),
        "max_steps": 2,
        "train_data": (str(folder / "bare"),),
    },
    "nothing is left to train": lambda folder: {"resume_ckpt": str(folder / "run"), "max_steps": 2},
    "give the same model": lambda folder: {
        "from_ckpt": folder / "run",
        "model": folder / "deep",
        "num_train_epochs": 0,
        "output_dir": folder / "out",
    },
    "does not divide the 1 processes": lambda folder: {"pipe_parallel_size": 2},
    "give a folder of shards, or a file that ends in": lambda folder: {"train_data": (str(folder / "picture.png"),)},
    FP16: lambda folder: {"precision": "fp16"},
    "--num_warmup_steps 99": lambda folder: {"num_warmup_steps": 99.0},
    "--seq_len 8": lambda folder: {"seq_len": 8},
    "matches no module": lambda folder: {"target_modules": "no_such_module"},
    "has no routers": lambda folder: {"router_aux_loss_coef": 0.1},
    "token id 97 in the data": lambda folder: {"train_data": (str(folder / "beyond"),)},
    "quantization_config: fp8": lambda folder: {"model": folder / "fp8"},
    "--fused_loss on: the model's head is more": lambda folder: {
        "model": folder / "untied",
        "lora_dim": 2,
        "lora_target_modules": "lm_head",
        "fused_loss": "on",
    },
    "contradicts the options": lambda folder: {"ds_config": folder / "other.json"},
}


def answers(runs: list[dict[str, Any]]) -> list[str | None]:
    with contextlib.redirect_stdout(None):
        return [train_rank({**options, "dry_run": True}) for options in runs]


def test_it_refuses_what_a_run_refuses(folder: Path) -> None:
    [has_fp16] = Ranks(1).run(fp16_works)  # of the newest processors some do
    mistakes = {words: make for words, make in MISTAKES.items() if not (has_fp16 and words == FP16)}
    runs = [options_of(folder, **make(folder)) for make in mistakes.values()]
    [said] = Ranks(1).run(answers, runs)
    for words, options, answer in zip(mistakes, runs, said, strict=True):
        assert answer is not None, words
        assert words in answer
        assert Ranks(1).run(train_rank, options) == [answer]


def shown(options: dict[str, Any], console: Path) -> tuple[str | None, dict[str, Any], list[str]]:
    """The answer of a dry run, all that it finds, as an object, and the lines that it prints for people."""
    texts = []
    for as_json in (False, True):
        with console.open("w") as file, contextlib.redirect_stdout(file):
            answer = train_rank({**options, "dry_run": True, "json": as_json})
        texts.append(console.read_text())
    return answer, json.loads(texts[1]), texts[0].splitlines()


def test_values_that_are_set_automatically(folder: Path, tmp_path: Path) -> None:
    more = {"global_batch_size": 8, "output_dir": tmp_path / "out", "num_warmup_steps": 0.5, "num_train_epochs": 2}
    [(answer, found, lines)] = Ranks(1).run(shown, options_of(folder, **more), tmp_path / "console")
    options = found["options"]
    assert answer is None
    expected = {
        "zero_stage": 0,
        "gradient_accumulation_steps": 8,
        "log_dir": str(tmp_path / "out/log"),
        "attn_implementation": "sdpa",
        "compile": "off",
        "seq_len": max(len(row["input_ids"]) for row in random_rows(24)) - 1,
        "max_steps": 6,
        "num_warmup_steps": 3,
    }
    assert {name: options[name] for name in expected} == expected
    assert found["automatic"] == expected
    assert f"set automatically: {', '.join(f'{name} {value}' for name, value in expected.items())}" in lines
    assert (options["global_batch_size"], options["optimizer"], options["tag"]) == (8, "adamw", None)
    assert not (tmp_path / "out").exists()


def test_how_rows_are_shared(folder: Path, tmp_path: Path) -> None:
    """The mode that `auto` means, and what each process gets; a model that cannot is refused as in a run."""
    options = options_of(folder, sequence_parallel_size=2)
    lines = Ranks(2).run(console_of, {**options, "dry_run": True}, tmp_path)[0].splitlines()
    longest = max(len(row["input_ids"]) for row in random_rows(24)) - 1
    runs = f"of {longest} tokens {longest // 2}, {longest - longest // 2}"
    assert f"2 processes share the tokens of each row (ulysses): {runs}; attention under masks" in lines
    assert "1 stages x 2 runs of tokens x 1 pipelines on 2 processes" in lines
    [automatic] = [line for line in lines if line.startswith("set automatically: ")]
    assert "sequence_parallel_mode ulysses" in automatic
    assert "attn_implementation" not in automatic  # none that could be given
    make_folder(tiny_config("mamba", vocab_size=VOCABULARY), tmp_path / "recurrent")
    options |= {"model": tmp_path / "recurrent"}
    said = Ranks(2).run(train_rank, {**options, "dry_run": True})[0]
    assert said.startswith("--sequence_parallel_size 2: model type 'mamba' was not shown to look at other tokens")
    assert Ranks(2).run(train_rank, options) == [said, said]


def test_the_table_is_of_one_process(folder: Path, tmp_path: Path) -> None:
    """Slices have parts of every matrix and vectors whole; runs of tokens have all weights, and keep less of rows."""
    found = {}
    for name, more in (("one", {}), ("cut", {"model_parallel_size": 2}), ("shared", {"sequence_parallel_size": 2})):
        options = options_of(folder, **more, dry_run=True, json=True)
        (tmp_path / name).mkdir()
        found[name] = json.loads(Ranks(1 + bool(more)).run(console_of, options, tmp_path / name)[0])
    [one], [cut], [shared] = (each["stages"] for each in found.values())
    assert found["one"]["parameters"] == found["cut"]["parameters"] == found["shared"]["parameters"]
    assert one["parameters"] == shared["parameters"] == found["one"]["parameters"]
    assert 0.5 * one["parameters"] < cut["parameters"] < 0.6 * one["parameters"]
    assert cut["memory_bytes"] < 0.8 * one["memory_bytes"]
    assert cut["memory_bytes"] < shared["memory_bytes"] < one["memory_bytes"]


def test_costs_are_those_of_the_datas_rows(folder: Path, tmp_path: Path) -> None:
    """The stage table is that of rows as long as the data's, by the manifest, whatever `--seq_len` allows."""
    longest = max(len(row["input_ids"]) for row in random_rows(24)) - 1
    tables = []
    for more in ({}, {"seq_len": longest}, {"seq_len": 2048}, {"train_data": (str(folder / "many-bare"),)}):
        more = {"train_data": (str(folder / "many"),), **more}
        options = options_of(folder, per_device_train_batch_size=8192, **more)
        [(_, _, lines)] = Ranks(1).run(shown, options, tmp_path / "console")
        tables.append(next(line for line in lines if " GiB" in line))
    assert tables[0] == tables[1] == tables[2]
    assert float(tables[3].split(" GiB")[0].split()[-1]) > 10 * float(tables[0].split(" GiB")[0].split()[-1])


def test_it_does_nothing(folder: Path, tmp_path: Path) -> None:
    """Text is not converted, and a checkpoint neither resumed nor converted; all of which a run would do."""
    text = tmp_path / "text.jsonl"
    shutil.copyfile(folder / "text.jsonl", text)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"train_data": (str(text),), "eval_data": (str(text),)}, f"{text} would be converted to shards first"),
        (
            {"train_data": (), "num_train_epochs": 0, "from_ckpt": folder / "run", "output_dir": tmp_path / "out"},
            f"no training: {tmp_path / 'out'} gets the weights of {folder / 'run'}",
        ),
        (
            {"resume_ckpt": str(folder / "run"), "tag": "step-00000002", "max_steps": 4, "force_resume": True},
            f"goes on from {folder / 'run/step-00000002'}",
        ),
        ({"resume_ckpt": "auto", "checkpoint": tmp_path / "none"}, "no checkpoint: starts afresh"),
    ]
    for more, line in cases:
        [(answer, _, lines)] = Ranks(1).run(shown, options_of(folder, **more), tmp_path / "console")
        assert answer is None
        assert line in lines
        assert any(each.startswith("time: ") for each in lines) or "num_train_epochs" in more
    assert sorted(path.name for path in tmp_path.iterdir()) == ["console", "text.jsonl"]


def test_it_says_whether_the_loss_is_fused(folder: Path, tmp_path: Path) -> None:
    """As the run does, on the process that prints, which has no head."""
    fused = "loss: fused with the head"
    for more in ({"dry_run": True}, {"dry_run": True, "json": True}, {"max_steps": 1}):
        options = options_of(folder, fused_loss="on", pipe_parallel_size=2, **more)
        assert Ranks(2).run(console_of, options, tmp_path)[0].count(fused) == 1


def console_of(options: dict[str, Any], folder: Path) -> str:
    """What a rank of a run prints."""
    console = folder / f"console-{os.getpid()}"
    with console.open("w") as file, contextlib.redirect_stdout(file):
        assert train_rank(options) is None
    return console.read_text()


def test_what_differs_comes_first_and_warnings_last(folder: Path, tmp_path: Path) -> None:
    more = {"learning_rate": 0.5, "batch_size_tokens": 128, "seed": 1234}
    [(answer, found, lines)] = Ranks(1).run(shown, options_of(folder, **more), tmp_path / "console")
    assert answer is None
    assert lines[:6] == [
        "options that differ from the defaults:",
        f"  --train_data         {folder / 'data'}",
        f"  --model              {folder / 'model'}",
        "  --batch_size_tokens  128",
        "  --learning_rate      0.5  (default: 1e-05)",
        "  --precision          fp32  (default: bf16)",
    ]
    assert lines[6].startswith("set automatically: ")
    assert set(found["differs"]) == {"train_data", "model", "batch_size_tokens", "learning_rate", "precision"}
    assert found["options"]["seed"] == 1234
    assert (found["processes"], found["pipelines"], found["bubble"], len(found["stages"])) == (1, 1, 0.0, 1)
    assert found["stages"][0]["end_layer"] == 4
    assert found["rows"] == 24
    assert found["filling"]["steps"] == found["steps_per_epoch"] == found["steps"]
    assert 0 < found["filling"]["filled"] < 1
    said = [line.removeprefix("warning: ") for line in lines if line.startswith("warning: ")]
    assert said == found["warnings"]
    assert lines[len(lines) - len(said) :] == [line for line in lines if line.startswith("warning: ")]
    assert any(line.startswith("micro-batches of 128 tokens are ") for line in [*lines, *said])


def test_uneven_pipelines_are_told(folder: Path, tmp_path: Path) -> None:
    """Before a run of two processes, which this process is not."""
    from jllm.train.dry_run import dry_run

    more = {"model": folder / "deep", "pipe_parallel_size": 2, "partition_method": "4,1"}
    console = tmp_path / "console"
    with console.open("w") as file, contextlib.redirect_stdout(file):
        dry_run(TrainConfig(**options_of(folder, **more, dry_run=True)))
    *_, uneven, bubble = console.read_text().splitlines()
    assert uneven.startswith("warning: the slowest of 2 stages takes ")
    assert "--partition_method fast (" in uneven
    assert bubble.startswith("warning: a step of 1 micro-batches in 2 stages is 50% bubble")
    assert "give --gradient_accumulation_steps 3 (25%, a step has 3 rows)" in bubble


def test_json_needs_a_dry_run(folder: Path) -> None:
    with pytest.raises(UserError, match="--json prints what --dry_run finds"):
        TrainConfig(**options_of(folder, json=True))


def said_by(options: dict[str, Any], console: Path) -> tuple[str | None, str]:
    """The answer of a run, and what it writes to the console."""
    with console.open("w") as file, contextlib.redirect_stdout(file):
        answer = train_rank(options)
    return answer, console.read_text()


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with 40 learned positions and dropout, and rows of 41 tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("learned")
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=40, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(folder / "model")
    write_rows(folder / "data", [{"input_ids": [1, 2] * 20 + [3]}] * 8)
    write_rows(folder / "bare", [{"input_ids": [1, 2] * 20 + [3]}] * 8, manifest=False)
    write_rows(folder / "long", [{"input_ids": [1, 2] * 20 + [3]}] * 8 + [{"input_ids": [4] * 42}])
    write_rows(folder / "long-bare", [{"input_ids": [4] * 42}] * 8, manifest=False)
    return folder


@pytest.mark.parametrize("more", [{}, {"seq_len": 64}, {"batch_size_tokens": 80}])
@pytest.mark.parametrize("name", ["data", "bare"])
def test_rows_are_padded_to_the_learned_positions(
    learned: Path, tmp_path: Path, name: str, more: dict[str, Any]
) -> None:
    """Rows as long as the table are trained on: padding, which goes up to 64 elsewhere, ends with it."""
    options = {**options_of(learned, max_steps=1, learning_rate=1e-3), "train_data": (str(learned / name),), **more}
    [(answer, _)] = Ranks(1).run(said_by, options, tmp_path / "console")
    assert answer is None


def test_rows_beyond_the_learned_positions(learned: Path, tmp_path: Path) -> None:
    for name, dry, words in (
        ("long", True, "has rows of 42 tokens, and the model has learned positions for 40"),
        (
            "long-bare",
            False,
            ": a row has 42 tokens, and the model has learned positions for 40; make shards with",
        ),
    ):
        options = {**options_of(learned, max_steps=1), "train_data": (str(learned / name),)}
        [(answer, _)] = Ranks(1).run(said_by, options, tmp_path / "console")
        assert answer is not None
        assert words in answer
        [told] = Ranks(1).run(answers, [options])
        assert told == [answer if dry else None]


def test_dropout_is_said_and_can_be_left_out(learned: Path, tmp_path: Path) -> None:
    """In both, with the same words; without dropout the loss of a step is the model's own."""
    losses: dict[float | None, list[float]] = {}
    for rate, words in (
        (None, "dropout: resid_pdrop 0.1, embd_pdrop 0.1, attn_pdrop 0.1, by the model's config.json; --dropout 0"),
        (0.0, "dropout: 0 by --dropout, instead of resid_pdrop 0.1"),
    ):
        for seed in (1, 2):  # the rows are equal, so that only dropout is drawn anew
            log = tmp_path / f"{rate}-{seed}"
            options = {**options_of(learned, max_steps=2, dropout=rate, seed=seed, learning_rate=1e-2), "log_dir": log}
            [(answer, text)] = Ranks(1).run(said_by, options, tmp_path / "console")
            assert answer is None
            assert words in text
            losses.setdefault(rate, []).extend(record["loss"] for record in records(log))
        [(answer, _, lines)] = Ranks(1).run(shown, {**options, "log_dir": None}, tmp_path / "console")
        assert any(line.startswith(words) for line in lines)
    assert losses[0.0][:2] == losses[0.0][2:]
    assert losses[None][0] != losses[0.0][0]


def test_rows_beyond_what_a_model_has_seen_are_a_warning(folder: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "long", [{"input_ids": [1, 2] * 150}] * 4)
    options = {**options_of(folder, max_steps=1), "train_data": (str(tmp_path / "long"),)}
    [(answer, text)] = Ranks(1).run(said_by, options, tmp_path / "console")
    [(_, _, lines)] = Ranks(1).run(shown, options, tmp_path / "console")
    assert answer is None
    words = f"warning: {tmp_path / 'long'} has rows of 300 tokens, and the model has seen positions up to 256"
    assert words in text
    assert any(line.startswith(words) for line in lines)
