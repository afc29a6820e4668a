"""Control adapters as LoRA: the same where residuals are parallel, and as far apart as is said where they are not."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("peft", reason="peft is not installed: pip install .[adapters]")

from peft import PeftModel
from transformers import AutoModelForCausalLM

from jllm.errors import UserError
from jllm.models.adapters.adapter_files import CONFIG_NAME, WEIGHTS_NAME
from jllm.models.adapters.control_to_lora import TOKENS, control_to_lora
from tests.models.adapters.adapted import logits, save_model
from tests.models.adapters.whole_control import WholeControl
from tests.models.tiny import VOCAB

RANK, WIDTH, LAYERS = 3, 32, (0, 2, 3)


def control(folder: Path, *, strength: float = 0.3) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A folder of control adapters on some layers; layer → Q and s."""
    torch.manual_seed(2)
    values = {
        f"model.layers.{number}": (
            torch.linalg.qr(torch.randn(WIDTH, RANK)).Q.contiguous(),
            strength * torch.randn(RANK),
        )
        for number in LAYERS
    }
    folder.mkdir()
    tensors = {}
    for name, (directions, strengths) in values.items():
        tensors |= {f"base_model.model.{name}.control_Q": directions, f"base_model.model.{name}.control_S": strengths}
    save_file(tensors, folder / WEIGHTS_NAME)
    (folder / CONFIG_NAME).write_text(json.dumps({"peft_type": "CONTROL", "r": RANK}))
    return values


@pytest.mark.parametrize("family", ["cohere2", "llama", "qwen3"])
@pytest.mark.parametrize("control_class", [1, -1])
def test_the_error_is_the_one_that_is_told(tmp_path: Path, family: str, control_class: int) -> None:
    base = save_model(tmp_path / "base", family)
    values = control(tmp_path / "control")
    done = control_to_lora(tmp_path / "control", base, tmp_path / "lora", control_class=control_class)
    ids = torch.randint(VOCAB, TOKENS, generator=torch.Generator().manual_seed(0))
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    before = logits(plain, ids)
    adapted = PeftModel.from_pretrained(plain, tmp_path / "lora").eval()
    found = logits(adapted, ids)
    whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    hooks = WholeControl(whole, values)
    hooks.classes = torch.full(TOKENS, control_class)
    wanted = logits(whole, ids)
    assert done.moved == pytest.approx(float((wanted - before).square().mean().sqrt()), rel=1e-3)
    error = float((found - wanted).square().mean().sqrt())
    assert done.error == pytest.approx(error, rel=1e-2, abs=1e-5)
    if family == "cohere2":
        assert error < 1e-5
        assert done.targets == ("down_proj", "o_proj")
    else:
        assert error < done.moved


@pytest.mark.parametrize("family", ["gemma2", "olmo2", "qwen3_moe", "gpt2"])
def test_other_families_are_refused(tmp_path: Path, family: str) -> None:
    base = save_model(tmp_path / "base", family)
    control(tmp_path / "control")
    if family == "gpt2":
        path = tmp_path / "control" / WEIGHTS_NAME
        save_file(
            {name.replace(".model.layers", ".transformer.h"): each for name, each in load_file(path).items()}, path
        )
    with pytest.raises(UserError, match=f"a layer of '{family}' has other parts than"):
        control_to_lora(tmp_path / "control", base, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_another_model(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "llama", hidden_size=64)
    control(tmp_path / "control")
    with pytest.raises(UserError, match=r"control_Q is \[32, 3\], --model needs \[64, 3\]"):
        control_to_lora(tmp_path / "control", base, tmp_path / "lora")


@pytest.mark.parametrize("layer", ["7", "x"])
def test_a_layer_that_the_model_has_not(tmp_path: Path, layer: str) -> None:
    base = save_model(tmp_path / "base", "llama")
    control(tmp_path / "control")
    path = tmp_path / "control" / WEIGHTS_NAME
    save_file({name.replace("layers.2.", f"layers.{layer}."): each for name, each in load_file(path).items()}, path)
    with pytest.raises(UserError, match=rf"layers\.{layer}\.control_Q is .* has no place in --model"):
        control_to_lora(tmp_path / "control", base, tmp_path / "lora")


def test_another_kind(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "llama")
    control(tmp_path / "control")
    (tmp_path / "control" / CONFIG_NAME).write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(UserError, match="an adapter of type 'LORA'; CONTROL is what this takes"):
        control_to_lora(tmp_path / "control", base, tmp_path / "lora")
