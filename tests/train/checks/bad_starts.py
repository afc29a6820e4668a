"""Some 200 starts of the trainer that cannot come to anything: options, models, data, folders, DeepSpeed settings."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.fixtures import VOCABULARY, random_rows, tiny_llama, write_rows

DRY, RUN, BOTH = "dry", "run", "both"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BadStart:
    """A command line that cannot work.

    Attributes:
        name: for people.
        words: the options; `{folder}` stands for the folder of good and bad things.
        said: must be in the one line that the start ends with.
        where: who says so: both, or, where only the run reads what is bad, that alone.
        make: puts what is bad into the folder.
    """

    name: str
    words: tuple[str, ...]
    said: str
    where: str = BOTH
    make: Callable[[Path], object] | None = None


def good(folder: Path) -> None:
    """A model with its data, which the bad things are made of."""
    tiny_llama(folder / "model", tied=True)
    write_rows(folder / "data", random_rows(24), files=2)
    (folder / "file").write_text("in the way")
    (folder / "nowhere").symlink_to(folder / "missing")
    (folder / "loop").symlink_to(folder / "loop")


def all_starts() -> list[BadStart]:
    """Every bad start, the kinds mixed, so that the first of them are some of each kind."""
    kinds = [list(each()) for each in (_numbers, _options, _models, _weights, _data, _folders, _settings)]
    longest = max(map(len, kinds))
    return [kind[number] for number in range(longest) for kind in kinds if number < len(kind)]


def _numbers() -> Iterator[BadStart]:
    """Numbers outside their ranges, which stand with the options."""
    given = {
        "--adam_eps": ("-1", "nan", "inf", "1e30"),
        "--learning_rate": ("nan", "inf", "-1", "1e31"),
        "--lr_min": ("1", "nan", "-1e-9"),
        "--weight_decay": ("inf", "-0.1"),
        "--adam_beta1": ("1", "-0.1", "nan"),
        "--adam_beta2": ("1.5",),
        "--gradient_clipping": ("nan", "-1", "inf"),
        "--num_warmup_steps": ("1.5", "-1", "inf", "99"),
        "--steps_per_eval": ("2.5", "nan", "-0.5"),
        "--minutes_per_checkpoint": ("inf", "-1"),
        "--force_constant_lr": ("nan",),
        "--timeout": ("0", "9223372036854775807", "99999999999999999999999"),
        "--max_steps": ("0", "1000000000000"),
        "--num_train_epochs": ("-1", "1000000000"),
        "--per_device_train_batch_size": ("0", "1000", "1000000000"),
        "--gradient_accumulation_steps": ("1000", "0"),
        "--global_batch_size": ("1000000000", "-8"),
        "--batch_size_tokens": ("1", "1000000000"),
        "--seq_len": ("0", "8", "1e3"),
        "--dropout": ("1", "-0.5", "nan", "0.5"),
        "--zero_stage": ("2", "-1"),
        "--seed": ("-1",),
        "--lock_wait": ("-1",),
    }
    for option, values in given.items():
        for value in values:
            yield BadStart(name=f"{option} {value}", words=(option, value), said=option)


def _options() -> Iterator[BadStart]:
    for words, said in {
        "--pipe_parallel_size 0": "--pipe_parallel_size 0",
        "--partition_method 3,3": "3,3",
        "--attn_implementation nosuch": "nosuch",
        "--target_modules nosuch": "matches no module",
        "--layers_to_transform 7:9": "--layers_to_transform",
        "--load_in_4bit": "give --lora_dim, --lora or",
        "--load_in_8bit --lora_dim 4 --skip_quant nosuch": "--skip_quant 'nosuch' matches no module",
        "--router_aux_loss_coef 0.1": "has no routers",
        "--resume_ckpt {folder}/nothere": "no complete checkpoint",
        "--skip_train_steps 0": "--skip_train_steps",
        "--best_of 1": "--eval_data",
        "--no_such_option 1": "no_such_option",
        "--time_limit soon --checkpoint {folder}/run": "--time_limit soon",
        "--eval_data {folder}/nothere": "no such folder",
        "--ckpt_epoch 1.5": "--ckpt_epoch",
        "--lr_scheduler_type cubic": "cubic",
    }.items():
        yield BadStart(name=words, words=tuple(words.split()), said=said)


def _models() -> Iterator[BadStart]:
    """Configurations that no model can have; `--init`, so that no weights are missed first."""
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"num_attention_heads": 5}, "config.json"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"hidden_size": 30}, "hidden size (30)"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": -32}, "hidden_size is -32"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers"),
        ({"num_attention_heads": 0}, "config.json"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"vocab_size": True}, "vocab_size"),
        ({"hidden_act": "nosuch"}, "nosuch"),
        ({"hidden_act": 3}, "hidden_act"),
        ({"max_position_embeddings": "long"}, "max_position_embeddings"),
        ({"rope_parameters": "yarn"}, "config.json"),
        ({"rope_parameters": {"rope_type": "nosuch", "rope_theta": 1.0}}, "nosuch"),
        ({"tie_word_embeddings": "maybe"}, "tie_word_embeddings"),
        ({"attention_dropout": 1.5}, "attention_dropout is 1.5"),
        ({"attention_dropout": -0.5}, "attention_dropout is -0.5"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"intermediate_size": [1, 2]}, "intermediate_size"),
        ({"pad_token_id": "end"}, "pad_token_id"),
        ({"model_type": "lama"}, "Did you mean"),
        ({"model_type": 3}, "no model_type"),
        ({"model_type": "t5"}, "no causal language model"),
    ]
    for number, (fields, said) in enumerate(wrong):
        name = f"model-{number}"

        def make(folder: Path, fields: dict[str, Any] = fields, name: str = name) -> None:
            config = json.loads((folder / "model/config.json").read_text())
            (folder / name).mkdir()
            (folder / name / "config.json").write_text(json.dumps({**config, **fields}))

        yield BadStart(name=f"config {fields}", words=("-m", f"{{folder}}/{name}", "--init"), said=said, make=make)
    for name, text in {"empty": "", "list": "[]", "bytes": "\x00\x01", "half": '{"model_type": "lla'}.items():

        def write(folder: Path, text: str = text, name: str = name) -> None:
            (folder / f"json-{name}").mkdir()
            (folder / f"json-{name}" / "config.json").write_text(text)

        yield BadStart(name=f"json {name}", words=("-m", f"{{folder}}/json-{name}"), said="config.json", make=write)
    yield BadStart(name="model is a file", words=("-m", "{folder}/file"), said="does not exist")
    yield BadStart(name="model without config", words=("-m", "{folder}/data"), said="has no config.json")


def _weights() -> Iterator[BadStart]:
    import torch
    from safetensors.torch import load_file, save_file

    def changed(name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            shutil.copytree(folder / "model", folder / name)
            tensors = load_file(folder / "model/model.safetensors")
            change(tensors)
            save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})

        return make

    norm = "model.layers.2.input_layernorm.weight"
    for value in ("nan", "inf", "-inf"):
        name = f"weights{value}"
        make = changed(name, lambda tensors, value=value: tensors[norm][3].fill_(float(value)))  # type: ignore[misc]
        words = ("-m", f"{{folder}}/{name}")
        yield BadStart(name=name, words=words, said=norm, where=RUN, make=make)
        yield BadStart(name=f"{name} read", words=(*words, "--check_weights"), said=norm, where=DRY)
    yield BadStart(
        name="weight of another shape",
        words=("-m", "{folder}/narrow"),
        said="do not fit",
        where=RUN,
        make=changed("narrow", lambda tensors: tensors.update({norm: torch.ones(3)})),
    )
    yield BadStart(
        name="weight missing",
        words=("-m", "{folder}/lacking"),
        said=norm,
        where=RUN,
        make=changed("lacking", lambda tensors: tensors.pop(norm)),
    )

    def cut(folder: Path) -> None:
        shutil.copytree(folder / "model", folder / "cut")
        path = folder / "cut/model.safetensors"
        os.truncate(path, path.stat().st_size - 100)

    yield BadStart(name="weights cut short", words=("-m", "{folder}/cut"), said="cut", where=RUN, make=cut)
    yield BadStart(name="cut, read", words=("-m", "{folder}/cut", "--check_weights"), said="cut", where=DRY)


def _data() -> Iterator[BadStart]:
    def rows(name: str, rows: list[dict[str, Any]], **more: Any) -> Callable[[Path], object]:
        return lambda folder: write_rows(folder / name, rows, **more)

    def table(name: str, **columns: list[Any]) -> Callable[[Path], None]:
        """A set that somebody else wrote."""

        def make(folder: Path) -> None:
            (folder / name).mkdir()
            typed = {key: pa.array(value, pa.list_(pa.int32())) for key, value in columns.items()}
            pq.write_table(pa.table(typed), folder / name / "part-0.parquet")

        return make

    def case(name: str, said: str, make: Callable[[Path], object], where: str = BOTH) -> BadStart:
        return BadStart(name=name, words=("--train_data", f"{{folder}}/{name}"), said=said, make=make, where=where)

    ids = [[1, 2, 3, 4]] * 8
    beyond = [{"input_ids": [1, VOCABULARY, 2]}] * 8
    masked = [{"input_ids": [1, 2, 3], "labels": [-100] * 3}] * 8
    yield case("beyond", f"token id {VOCABULARY}", rows("beyond", beyond))
    yield case("beyond-bare", f": token id {VOCABULARY} in the data", rows("beyond-bare", beyond, manifest=False), RUN)
    yield case("negative", "token id -5", table("negative", input_ids=[[1, -5, 3]] * 8), RUN)
    yield case("masked", "no token of", rows("masked", masked))
    yield case("masked-bare", "no token of", rows("masked-bare", masked, manifest=False))
    yield case("single", "no token of", rows("single", [{"input_ids": [1]}] * 8))
    yield case("short-labels", "3 labels for 4 ids", table("short-labels", input_ids=ids, labels=[[1, 2, 3]] * 8))
    yield case("long-labels", "5 labels for 4 ids", table("long-labels", input_ids=ids, labels=[[1, 2, 3, 4, 5]] * 8))
    yield case("other-labels", "has the label 9 for", table("other-labels", input_ids=ids, labels=[[1, 2, 9, 4]] * 8))
    yield case(
        "large-labels", "has the label 12345", table("large-labels", input_ids=ids, labels=[[1, 2, 3, 12345]] * 8)
    )
    yield case(
        "shifted-labels", "are not shifted", table("shifted-labels", input_ids=ids, labels=[[2, 3, 4, -100]] * 8)
    )
    yield case("no-ids", "no column input_ids", table("no-ids", tokens=ids))
    yield case("no-rows", "no rows", table("no-rows", input_ids=[]))
    yield case("trained-on", "trained_mask", table("trained-on", input_ids=ids, trained_mask=ids))

    def damage(name: str, change: Callable[[Path], object]) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            shutil.copytree(folder / "data", folder / name)
            change(next((folder / name).rglob("*.parquet")))

        return make

    yield case("cut-shard", "changed since", damage("cut-shard", lambda path: os.truncate(path, 200)))
    yield case("lost-shard", "not there", damage("lost-shard", lambda path: path.unlink()))
    yield case(
        "more-shards", "not in its manifest", damage("more-shards", lambda path: shutil.copy(path, f"{path}.parquet"))
    )
    yield case("edited", "fingerprint", damage("edited", lambda path: _edit(path.parent.parent / "_manifest.json")))
    for weight in ("0", "-1", "nan", "inf", "1e12", "1e-9"):
        yield BadStart(
            name=f"weight {weight}", words=("--train_data", f"{{folder}}/data={weight}"), said="--train_data"
        )
    yield BadStart(name="a file", words=("--train_data", "{folder}/file"), said="give a folder of shards")
    yield BadStart(name="no folder", words=("--train_data", "{folder}/none"), said="no such folder")
    yield BadStart(name="a model", words=("--train_data", "{folder}/model"), said="no Parquet shards")
    yield BadStart(name="masked eval", words=("--eval_data", "{folder}/masked"), said="no token of")
    yield BadStart(
        name="two of a name",
        words=("--eval_data", "{folder}/data", "--eval_data", "x/data"),
        said="two sets named data",
    )


def _edit(path: Path) -> None:
    value = json.loads(path.read_text())
    value["files"][0]["rows"] += 1
    path.write_text(json.dumps(value))


def _folders() -> Iterator[BadStart]:
    for option in ("--checkpoint", "--output_dir", "--log_dir"):
        for place, said in {
            "file": "is a file",
            "file/below/it": "is a file",
            "nowhere": "which is not there",
            "nowhere/below": "which is not there",
            "loop": "loop: Too many levels",
            "x" * 300: "name too long",
            "deep/" + "x" * 300: "name too long",
        }.items():
            yield BadStart(name=f"{option} {place[:20]}", words=(option, f"{{folder}}/{place}"), said=said)
        for place in ("/proc/run", "/dev/null", "/sys/run"):
            yield BadStart(name=f"{option} {place}", words=(option, place), said=f"{option} {place}")
        yield BadStart(name=f"{option} model", words=(option, "{folder}/model"), said="the folder of --model")


def _settings() -> Iterator[BadStart]:
    wrong: list[tuple[Any, str]] = [
        ([], "give an object"),
        ({"zero_optimisation": {}}, 'Did you mean "zero_optimization"'),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage = 3 contradicts"),
        ({"zero_optimization": {"reduce_buckt_size": 1}}, 'Did you mean "reduce_bucket_size"'),
        ({"zero_optimization": {"reduce_bucket_size": "big"}}, "zero_optimization.reduce_bucket_size"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "offload_optimizer"),
        ({"zero_optimization": True}, "give an object"),
        ({"optimizer": {"type": "Adam"}}, "--optimizer"),
        ({"scheduler": {"type": "WarmupLR"}}, "--lr_scheduler_type"),
        ({"bf16": {"enabled": True}}, "bf16.enabled"),
        ({"train_batch_size": 7}, "train_batch_size = 7 contradicts"),
        ({"amp": {"enabled": True}}, "AMP"),
        ({"wall_clock_breakdown": "yes"}, "DeepSpeed"),
        ({"pipeline": {"seed_layrs": True}}, 'Did you mean "seed_layers"'),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "grad_accum_dtype"),
        ({"communication_data_type": "fp99"}, "fp99"),
        ({"flops_profiler": {"profile_stp": 1}}, "flops_profiler.profile_stp"),
        ({"gradient_allreduce_op": "sum"}, "exact mean"),
        ({"autotuning": {"enabled": True}}, "autotuning"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel"),
    ]
    for number, (value, said) in enumerate(wrong):
        name = f"settings-{number}.json"

        def make(folder: Path, value: Any = value, name: str = name) -> None:
            (folder / name).write_text(json.dumps(value))

        yield BadStart(name=f"settings {value}", words=("--ds_config", f"{{folder}}/{name}"), said=said, make=make)
    yield BadStart(name="settings in no JSON", words=("--ds_config", "{folder}/file"), said="not valid JSON")
