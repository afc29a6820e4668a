"""Adapters in peft's folders: what is refused, by name."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("peft", reason="peft is not installed: pip install .[adapters]")

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from jllm.errors import UserError
from jllm.models.adapters.adapter_files import CONFIG_NAME, WEIGHTS_NAME
from jllm.models.adapters.lora import attach_lora
from jllm.models.adapters.lora_plan import targets_of
from jllm.models.adapters.peft_folder import check_adapter, load_adapter, read_adapter_config
from jllm.models.pipeline.span import spans_of
from jllm.models.weights.loading import load_stage
from jllm.models.weights.source import causal_class, read_config
from tests.fixtures import tiny_llama


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A model, and an adapter on its embedding and two kinds of linear maps that peft wrote."""
    model = tiny_llama(tmp_path / "model", tied=False)
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    settings = LoraConfig(r=4, target_modules=["q_proj", "up_proj", "embed_tokens"], task_type="CAUSAL_LM")
    get_peft_model(whole, settings).save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "adapter"


def use(model: Path, adapter: Path) -> None:
    """What a run does with an adapter."""
    origin = read_config(model)
    family = causal_class(origin)
    plan = targets_of(read_adapter_config(adapter), origin, family)
    check_adapter(adapter, plan, origin=origin, family=family)
    [span] = spans_of([0, origin.num_hidden_layers])
    stage = load_stage(model, span, dtype=torch.float32)
    attach_lora(stage, plan, seed=0, dtype=torch.float32)
    load_adapter(stage, adapter, plan.config, origin=origin, family=family)


def test_one_that_fits(folders: tuple[Path, Path]) -> None:
    use(*folders)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "an adapter of type 'IA3'; LORA is what this takes"),
        ({"bias": "all"}, "its bias is 'all', which the trainer does not have"),
        ({"trainable_token_indices": [1]}, "its trainable_token_indices is [1], which the trainer does not have"),
        ({"r": 0}, "has r 0, allowed is a whole number from 1 on"),
        ({"target_modules": ["nothing"]}, "Target modules {'nothing'} not found"),
        ({"r": 8}, "is [4, 97], --model needs [8, 97]"),
        ({"target_modules": ["q_proj"]}, "has no place in --model"),
        ({"target_modules": ["q_proj", "up_proj", "embed_tokens", "k_proj"]}, "k_proj.lora_A.weight is missing"),
    ],
)
def test_configurations_that_do_not_fit(folders: tuple[Path, Path], change: dict[str, object], message: str) -> None:
    model, adapter = folders
    fields = json.loads((adapter / CONFIG_NAME).read_text())
    (adapter / CONFIG_NAME).write_text(json.dumps(fields | change))
    with pytest.raises(UserError) as refused:
        use(model, adapter)
    assert message in str(refused.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '"LORA"', "{}"])
def test_what_is_no_configuration(folders: tuple[Path, Path], text: str) -> None:
    model, adapter = folders
    (adapter / CONFIG_NAME).write_text(text)
    with pytest.raises(UserError, match="--lora"):
        use(model, adapter)


@pytest.mark.parametrize("damage", ["cut", "absent", "nan", "another embedding"])
def test_values_that_cannot_be_taken(folders: tuple[Path, Path], damage: str) -> None:
    model, adapter = folders
    path = adapter / WEIGHTS_NAME
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "absent":
        path.unlink()
    else:
        tensors = load_file(path)
        name = next(n for n in tensors if ("lora_A" in n if damage == "nan" else "base_layer" in n))
        tensors[name].view(-1)[0] = float("nan") if damage == "nan" else 7.0
        save_file(tensors, path)
    messages = {
        "cut": "cannot be read",
        "absent": "there is no adapter_model.safetensors",
        "nan": "has values that are not finite",
        "another embedding": "another one than --model",
    }
    with pytest.raises(UserError, match=messages[damage]):
        use(model, adapter)


def test_there_is_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        read_adapter_config(tmp_path / "nowhere")
