"""`jllm cat2hf` gives, byte for byte, what one process of the trainer exports of the same checkpoint."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft", reason="peft is not installed: pip install .[adapters]")
pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install .[adapters]")

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from jllm.errors import UserError
from jllm.train.checkpoint.to_folder import to_folder
from tests.distributed.ranks import Ranks
from tests.distributed.runs import options_of, train_rank
from tests.fixtures import random_rows, write_rows
from tests.models.adapters.adapted import save_adapter, save_model

CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "fp32, 2 stages": ("llama", {"precision": "fp32"}, 2),
    "bf16, tied, 2 x 2": ("llama tied", {"precision": "bf16"}, 4),
    "an expert each": ("mixtral", {"precision": "bf16"}, 2),
    "averages": ("llama tied", {"precision": "fp32", "optimizer": "schedule_free"}, 2),
    "averages of masters": ("llama", {"precision": "bf16", "optimizer": "schedule_free"}, 2),
    "adapters and a head": (
        "llama tied", {"precision": "fp32", "lora_dim": 4, "use_dora": True, "lora_layers": "1:2",
                       "modules_to_save": "lm_head"}, 2,
    ),
    "adapters in bf16": (
        "qwen3_moe", {"precision": "bf16", "lora_dim": 2, "lora_dtype": "bf16",
                      "lora_target_modules": "all-linear,experts"}, 2,
    ),
    "from an adapter, beside 4 bits": ("llama", {"precision": "fp32", "lora": "adapter"}, 2),
    "control adapters": ("llama", {"precision": "bf16", "control_adapter_rank": 3, "control_adapter_layers": "1:3"}, 2),
}  # fmt: skip


def trained(ranks: Callable[[int], Ranks], folder: Path, case: str) -> dict[str, Any]:
    """A checkpoint after two steps in `folder`/ckpt; gives the options of its run."""
    family, settings, world = CASES[case]
    name, _, tied = family.partition(" ")
    save_model(folder / "model", name, tied=bool(tied) if name == "llama" else None)
    (folder / "model/tokenizer_config.json").write_text("{}")
    rows = random_rows(20, vocabulary=96)
    for row in rows if "control_adapter_rank" in settings else ():
        row["control_class"] = [1] * len(row["input_ids"])
    write_rows(folder / "data", rows, files=2)
    if "lora" in settings:
        save_adapter(folder / "model", folder / "adapter", target_modules=["q_proj", "v_proj"], modules_to_save=None)
        settings = {**settings, "lora": folder / "adapter"}
        how = BitsAndBytesConfig(load_in_4bit=True)
        whole = AutoModelForCausalLM.from_pretrained(folder / "model", quantization_config=how, dtype=torch.float32)
        whole.save_pretrained(folder / "model")
    more = {"learning_rate": 1e-2, "gradient_accumulation_steps": 2, "max_steps": 2, "partition_method": "uniform"}
    if settings.get("optimizer") == "schedule_free":
        more["lr_scheduler_type"] = "constant"
    options = options_of(folder, {**more, **settings, "checkpoint": folder / "ckpt", "log_dir": folder / "log"})
    assert ranks(world).run(train_rank, options) == [None] * world
    return options


@pytest.mark.parametrize("case", CASES)
def test_equals_the_trainers_export(ranks: Callable[[int], Ranks], tmp_path: Path, case: str) -> None:
    options = trained(ranks, tmp_path, case)
    convert = {"from_ckpt": tmp_path / "ckpt", "num_train_epochs": 0, "max_steps": None, "checkpoint": None}
    more = {"output_dir": tmp_path / "exported", "pipe_parallel_size": 1}
    assert ranks(1).run(train_rank, {**options, **convert, **more}) == [None]
    done = to_folder(tmp_path / "ckpt", tmp_path / "made")
    assert (done.step, done.what) == (2, "the adapter" if "adapter" in case else "the model")
    assert done.has_checksums
    expected = {path.name: path.read_bytes() for path in (tmp_path / "exported").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()} == expected
    if "adapter" not in case:
        _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "made", output_loading_info=True)
        assert not any(report[each] for each in ("missing_keys", "unexpected_keys", "mismatched_keys"))


WITHOUT_DEEPSPEED = """
import sys
sys.modules["deepspeed"] = None  # as where it is not installed
sys.argv[0] = "cat2hf"
from jllm.commands.cat2hf import main
main()
"""


def test_the_command_and_what_it_refuses(ranks: Callable[[int], Ranks], tmp_path: Path) -> None:
    """Without DeepSpeed; by the step; a checkpoint that is damaged, of another model, or whose model is gone."""
    trained(ranks, tmp_path, "fp32, 2 stages")

    def cat2hf(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-c", WITHOUT_DEEPSPEED, *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)

    done = cat2hf("-C", "ckpt", "--tag", "2", "-H", "made")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert done.stdout == "wrote made: the model of ckpt/step-00000002, after step 2\n"
    to_folder(tmp_path / "ckpt", tmp_path / "cut", shard_bytes=20_000)
    whole = load_file(tmp_path / "made/model.safetensors")
    files = sorted((tmp_path / "cut").glob("model-*.safetensors"))
    assert len(files) > 3
    found: dict[str, Any] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert found.keys() == whole.keys()
    assert all((found[name] == whole[name]).all() for name in whole)

    other = save_model(tmp_path / "other", "llama", tied=False, intermediate_size=40)
    with pytest.raises(UserError, match=r"--model has intermediate_size 40, that of --checkpoint had 48"):
        to_folder(tmp_path / "ckpt", tmp_path / "no", model=other)
    with pytest.raises(UserError, match="--tag 7: no complete checkpoint of that name"):
        to_folder(tmp_path / "ckpt", tmp_path / "no", tag="7")
    (tmp_path / "model").rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"is of the model .*model, which is not there; give its folder with --model"):
        to_folder(tmp_path / "ckpt", tmp_path / "no")
    [damaged] = (tmp_path / "ckpt").glob("step-*/rank-00001.safetensors")
    content = bytearray(damaged.read_bytes())
    content[len(content) // 3 :: 50] = b"\x55" * len(content[len(content) // 3 :: 50])
    damaged.write_bytes(content)
    refused = cat2hf("-C", "ckpt", "-H", "no", "-m", "moved")
    assert refused.returncode == 2
    assert "rank-00001.safetensors: is damaged: " in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert not (tmp_path / "no").exists()
    assert not list(tmp_path.glob(".no*")), "nothing half made is left"
