"""Command lines that people of this kind of tool have in their scripts: they work word for word.

Left out is what belongs to features that are not there yet: tensor and sequence parallelism, LoRA, images.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import click
import pytest
from safetensors.torch import load_file

from jllm.commands import raw2ids, repartition, shuffle_datasets, shuffle_partition, train_pipe
from jllm.data.dataset.manifest import open_data_set
from jllm.train.config import TrainConfig
from tests.data.raw2ids_runs import documents, write_jsonl
from tests.data.tokenizers_for_tests import make_byte_tokenizer
from tests.distributed.ranks import Ranks
from tests.distributed.runs import train_rank
from tests.fixtures import random_rows, tiny_llama, write_rows
from tests.pages.inputs import CHATML
from tests.pages.session import Session
from tests.train.records.flags import parse

Flags = tuple[tuple[str, Any], ...]
DATA_COMMANDS: dict[str, tuple[click.Command, Flags]] = {
    "raw2ids": (
        raw2ids.main,
        (
            ("-i --input", None), ("-o --output", None), ("--tokenizer", None), ("-t --type", "ft"), ("-n", 1 << 23),
            ("-c --compress", "zstd"), ("--batch_size", 65536), ("--max_len", 2048), ("--stack", False),
            ("--pad", False), ("--filter", False), ("--cores", -1), ("-T", False), ("-C --clean", False),
            ("--join", "\n\n"), ("-h --help", None),
        ),
    ),
    "shuffle_datasets": (
        shuffle_datasets.main,
        (
            ("-d", None), ("-o", None), ("-n --num_block", None), ("--cores", -1), ("--mem_rate", 0.8),
            ("--memory", None), ("--seed", 1234), ("-h --help", None),
        ),
    ),
    "shuffle_partition": (shuffle_partition.main, (("-d", None), ("--output", None), ("-h --help", None))),
    "repartition": (repartition.main, (("-d", None), ("-n --num_partition", None), ("-h --help", None))),
}  # fmt: skip
TRAIN: Flags = (
    ("--train_data", ()), ("--eval_data", ()), ("--seq_len", None), ("--block_mask", False), ("--num_workers", 1),
    ("--no_shuf", False), ("--dist_data", False), ("--skip_train_steps", ""), ("--model", None), ("--init", False),
    ("--from_ckpt", None), ("--resume_ckpt", None), ("--tag", None), ("--output_dir", None),
    ("--pipe_parallel_size", 1), ("--model_parallel_size --tensor_parallel_size", 1), ("--sequence_parallel_size", 1),
    ("--zero_stage", None), ("--ds_config", None), ("--timeout", 1800), ("--partition_method", "fast"),
    ("--split_dlayer", False), ("--emb_partitions", 1), ("--per_device_train_batch_size --micro_batch_size", 1),
    ("--gradient_accumulation_steps", None), ("--global_batch_size", None), ("--num_train_epochs", 1),
    ("--max_steps", None), ("--steps_per_print", 1), ("--optimizer", "adamw"), ("--learning_rate", 1e-5),
    ("--weight_decay", 0.0), ("--adam_beta1", 0.9), ("--adam_beta2", 0.999), ("--adam_eps", 1e-8),
    ("--gradient_clipping", 1.0), ("--precision", "bf16"), ("--lr_scheduler_type", "cosine"),
    ("--num_warmup_steps", 0.0), ("--checkpoint_grad_interval", 0), ("--no_checkpoint_grad_step", 0),
    ("--checkpoint", None), ("--steps_per_checkpoint", 0), ("--steps_per_eval", 0.0), ("--ckpt_step_gt", 0),
    ("--ckpt_epoch", ""), ("--skip_epoch", ""), ("--max_num_checkpoints", 0), ("--best_of", 0), ("--early_stop", 0),
    ("--only_ckpt_model", False), ("--background_executor", "process"), ("--seed", 1234), ("--log_dir", None),
    ("--config", None), ("-h --help", None),
)  # fmt: skip
COMMANDS = {**DATA_COMMANDS, "train_pipe": (train_pipe.main, TRAIN)}


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_flags_and_defaults_are_kept(name: str) -> None:
    command, kept = COMMANDS[name]
    context = click.Context(command, help_option_names=["-h", "--help"])
    for flags, default in kept:
        for flag in flags.split():
            [found] = [each for each in command.get_params(context) if flag in each.opts]
            if default is not None:
                assert found.get_default(context) == default, flag


CHOICES = {
    "raw2ids": {"--compress": "zstd gzip snappy lz4 brotli", "--type": "ft pretrain"},
    "train_pipe": {
        "--precision": "bf16 fp32 fp16",
        "--lr_scheduler_type": "linear cosine cosine_with_restarts polynomial constant constant_with_warmup",
        "--background_executor": "process thread none",
        "--partition_method": "fast mem uniform parameters type:regex 9,5 0,8,17,26",
        "--zero_stage": "0 1",
        "--resume_ckpt": "auto checkpoint",
        "--num_warmup_steps": "100 0.03",
    },
}


@pytest.mark.parametrize("name", sorted(CHOICES))
def test_values_are_kept(name: str) -> None:
    command = COMMANDS[name][0]
    for flag, values in CHOICES[name].items():
        [found] = [each for each in command.params if flag in each.opts]
        for value in values.split():
            found.type.convert(value, found, None)


def config_of(line: str) -> dict[str, Any]:
    """What the trainer makes of the options of a line."""
    words = line.replace("\\\n", " ").split()
    config = parse(*words[words.index("jllm.train_pipe") + 1 :])
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(TrainConfig)}


CONVERT_TEXT = """python -m jllm.raw2ids \\
    --tokenizer Qwen2.5-7B-Instruct \\
    -i {name}.jsonl \\
    -o datasets/{name}_Qwen2.5-7B-Instruct \\
    --max_len {length} \\
    --type pretrain \\
    -n 32768 \\
    --stack"""


def test_from_raw_files_to_partitions(tmp_path: Path) -> None:
    """Each line as it is known: conversions, `-C`, shuffle, partitions; then the trainer takes the folder."""
    folder = tmp_path / "here"
    model = tiny_llama(folder / "Qwen2.5-7B-Instruct", tied=False, vocabulary=410)
    make_byte_tokenizer(model, chat_template=CHATML)
    for seed, name in enumerate(("dataset0", "dataset1")):
        write_jsonl(folder / f"{name}.jsonl", documents(60, seed=seed))
    rows = [[{"user": "1 + 1?"}, {"assistant": str(number)}] for number in range(20)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    session = Session(folder)
    for line in (
        CONVERT_TEXT.format(name="dataset0", length=65),
        CONVERT_TEXT.format(name="dataset1", length=65),
        "python -m jllm.raw2ids \\\n --tokenizer Qwen2.5-7B-Instruct \\\n -i chats.jsonl -o chats_Qwen2.5-7B-Instruct",
        "python -m jllm.raw2ids --tokenizer Qwen2.5-7B-Instruct -i chats.jsonl -o chats_Qwen2.5-7B-Instruct"
        " --max_len 8193 -C",
        "python -m jllm.shuffle_datasets -d datasets -o shuffled_datasets -n 4",
        "python -m jllm.repartition -d shuffled_datasets -n 4",
        "python -m jllm.shuffle_partition -d datasets --output mixed_datasets",
    ):
        done = session.run(line)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    name = "dataset0_Qwen2.5-7B-Instruct"
    assert sorted(path.name for path in (folder / "datasets" / name).glob("dataset0-00000/*")) == [
        "dataset0-00000-00000.zstd.parquet"
    ]
    partitions = sorted((folder / "shuffled_datasets").glob("*-part-*"))
    assert [path.name.split("-part-")[1] for path in partitions] == ["00000", "00001", "00002", "00003"]
    for number, partition in enumerate(partitions):
        names = sorted(path.name for path in partition.glob("*.parquet"))
        wanted = [f"dataset{which}_Qwen2.5-7B-Instruct-00000-{number:05d}.zstd.parquet" for which in (0, 1)]
        assert names == wanted
    rows_before = sum(open_data_set(path).manifest.rows for path in (folder / "datasets").iterdir())
    assert open_data_set(folder / "shuffled_datasets").manifest.rows == rows_before
    assert open_data_set(folder / "mixed_datasets").manifest.rows == rows_before
    plan = session.run("""python -m jllm.train_pipe \\
        --model Qwen2.5-7B-Instruct \\
        --num_train_epochs 3 \\
        --train_data shuffled_datasets \\
        --pipe_parallel_size 2 \\
        --tensor_parallel_size 1 \\
        --per_device_train_batch_size 1 \\
        --global_batch_size 32 \\
        --partition_method fast \\
        --split_dlayer \\
        --only_ckpt_model \\
        --max_num_checkpoints 2 \\
        --learning_rate 1e-5 \\
        --checkpoint checkpoint --dry_run""")
    assert plan.returncode == 0, plan.stderr
    assert f"{rows_before:,} rows" in plan.stdout


TRAIN_LINE = """deepspeed --module jllm.train_pipe \\
    --model {folder}/model \\
    --num_train_epochs 3 \\
    --train_data {folder}/data \\
    --pipe_parallel_size 2 \\
    --model_parallel_size 1 \\
    --sequence_parallel_size 1 \\
    --per_device_train_batch_size 1 \\
    --gradient_accumulation_steps 8 \\
    --partition_method fast \\
    --split_dlayer \\
    --max_num_checkpoints 2 \\
    --learning_rate 1e-3 \\
    --precision fp32 \\
    --background_executor none \\
    --steps_per_checkpoint 1 \\
    --checkpoint {folder}/checkpoint"""
CONVERT_LINE = """deepspeed --module jllm.train_pipe \\
    --model {folder}/model \\
    --train_data {folder}/data \\
    --pipe_parallel_size 2 \\
    --partition_method 3,1 \\
    --num_train_epochs 0 \\
    --from_ckpt {folder}/checkpoint --tag {tag} \\
    --output_dir {folder}/{output}"""


def test_a_checkpoint_is_converted_by_the_number_of_its_step(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "model", tied=False)
    write_rows(tmp_path / "data", random_rows(12), files=2)
    assert Ranks(2).run(train_rank, config_of(TRAIN_LINE.format(folder=tmp_path))) == [None, None]
    steps = sorted(path.name for path in (tmp_path / "checkpoint").glob("step-*"))
    assert len(steps) == 2
    (tmp_path / "checkpoint" / steps[0]).rename(tmp_path / "checkpoint" / "step-00001000")
    converted = {}
    for tag, output in (("1000", "by-number"), ("step-00001000", "by-name"), (steps[1], "other")):
        line = CONVERT_LINE.format(folder=tmp_path, tag=tag, output=output)
        assert Ranks(2).run(train_rank, config_of(line)) == [None, None]
        files = sorted((tmp_path / output).glob("*.safetensors"))
        converted[output] = {name: weight for file in files for name, weight in load_file(file).items()}
    assert converted["by-number"].keys() == converted["by-name"].keys()
    assert all(weight.equal(converted["by-name"][name]) for name, weight in converted["by-number"].items())
    assert any(not weight.equal(converted["other"][name]) for name, weight in converted["by-number"].items())


def test_sizes_of_all_axes_are_taken(tmp_path: Path) -> None:
    line = f"deepspeed --module jllm.train_pipe --model {tmp_path} --train_data {tmp_path} --checkpoint {tmp_path}/c"
    for option in ("model_parallel_size", "sequence_parallel_size", "tensor_parallel_size"):
        assert config_of(f"{line} --{option} 2")[option.replace("tensor", "model")] == 2
