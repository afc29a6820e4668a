"""Adapters in GGUF: read back they are peft's changes, and llama.cpp says with them what peft says.

llama.cpp's Python package is looked for in the interpreter that JLLM_LLAMA_CPP names (by default the one of the tests):
it has to be compiled, so no extra of ours brings it.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("peft", reason="peft is not installed: pip install .[adapters]")
pytest.importorskip("gguf", reason="gguf is not installed: pip install .[adapters]")

import gguf
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

from jllm.errors import UserError
from jllm.models.adapters.gguf_export import FAMILIES, permuted, to_gguf
from tests.models.adapters import greedy
from tests.models.adapters.adapted import logits, save_adapter, save_model
from tests.models.adapters.gguf_base import write_base

SIZE = int(os.environ.get("JLLM_TEST_SIZE", "1"))
INTERPRETER = os.environ.get("JLLM_LLAMA_CPP", sys.executable)
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "starcoder2": [*LINEAR[:4], "c_fc", "c_proj"],
    "llama": [*LINEAR, "embed_tokens", "lm_head"],
}
UNTIED = ("llama", "mistral", "qwen2", "qwen3")
WINDOWS = ("mistral", "phi3", "starcoder2")
"""Whose windows of attention llama.cpp does not have in every case; these are longer than the texts here."""


def model_and_adapter(folder: Path, family: str, **settings: Any) -> tuple[Path, Any]:
    shape: dict[str, Any] = {"tied": False} if family in UNTIED else {}
    shape |= {"sliding_window": 64} if family in WINDOWS else {}
    base = save_model(folder / "base", family, **shape)
    more = {"fan_in_fan_out": True} if family == "gpt2" else {}
    targets = TARGETS.get(family, LINEAR)
    return base, save_adapter(base, folder / "adapter", **{"target_modules": targets, **more, **settings})


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("llama", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}, "use_rslora": True}),
        ("gpt2", {}),
        ("qwen3", {}),
    ],
)
def test_read_back(tmp_path: Path, family: str, settings: dict[str, Any]) -> None:
    base, adapted = model_and_adapter(tmp_path, family, **settings)
    done = to_gguf(tmp_path / "adapter", base, tmp_path / "a.gguf")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    texts = {name: reader.fields[name].contents() for name in ("general.type", "adapter.type", "general.architecture")}
    assert texts == {"general.type": "adapter", "adapter.type": "lora", "general.architecture": done.architecture}
    alpha = reader.fields["adapter.lora.alpha"].contents()
    values = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    names = gguf.get_tensor_name_map(next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == done.architecture), 4)
    layers = {name: layer for name, layer in adapted.named_modules() if isinstance(layer, LoraLayer)}
    assert len(values) == 2 * len(layers) == 2 * done.modules
    for name, layer in layers.items():
        found = names.get_name(name.removeprefix("base_model.model.")) + ".weight"
        first, second = values[f"{found}.lora_a"], values[f"{found}.lora_b"]
        expected = layer.get_delta_weight("default").detach()
        if "embed_tokens" in name:
            change = first @ second.T * (alpha / second.shape[1])
        else:
            change = second @ first * (alpha / second.shape[1])
            expected = expected.T if family == "gpt2" else expected
            if family == "llama" and name.endswith(("q_proj", "k_proj")):
                expected = permuted(expected, 4 if name.endswith("q_proj") else 2)
        np.testing.assert_allclose(change, expected, atol=1e-5, err_msg=name)


def has_llama_cpp() -> bool:
    done = subprocess.run([INTERPRETER, "-c", "import llama_cpp"], capture_output=True, timeout=60, check=False)
    return done.returncode == 0


@pytest.mark.parametrize("family", FAMILIES if SIZE > 1 else ("llama", "gpt2", "qwen3"))
def test_llama_cpp_says_what_peft_says(tmp_path: Path, family: str) -> None:
    """Eight greedy tokens, and the last scores, which llama.cpp computes on keys and values in fp16."""
    if not has_llama_cpp():
        pytest.skip("no llama_cpp: name an interpreter that has llama-cpp-python by JLLM_LLAMA_CPP")
    base, adapted = model_and_adapter(tmp_path, family)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    file = write_base(base, tmp_path / "base.gguf")
    to_gguf(tmp_path / "adapter", base, tmp_path / "a.gguf")
    sequences = []
    for model, adapter in ((plain, "-"), (adapted, str(tmp_path / "a.gguf"))):
        ids = list(range(5, 13))
        command = [INTERPRETER, greedy.__file__, str(file), adapter, "8", *map(str, ids)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stderr
        *_, found, scores = done.stdout.strip().splitlines()
        for _ in range(8):
            expected = logits(model, torch.tensor([ids]))[0, -1]
            ids.append(int(expected.argmax()))
        assert [int(each) for each in found.split()] == ids
        torch.testing.assert_close(torch.tensor([float(each) for each in scores.split()]), expected, atol=0.02, rtol=0)
        sequences.append(scores)
    assert sequences[0] != sequences[1]


@pytest.mark.parametrize(
    ("family", "shape", "settings", "message"),
    [
        ("mixtral", {}, {"target_modules": ["q_proj"]}, "adapters of 'mixtral' models cannot be written as GGUF"),
        ("llama", {}, {"target_modules": ["q_proj"], "use_dora": True}, "no place for DoRA"),
        (
            "llama", {}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
            "no place for lm_head.weight, trained whole",
        ),
        ("llama", {"tied": True}, {"target_modules": ["lm_head"]}, "lm_head.weight is head and embedding in one"),
    ],
)  # fmt: skip
def test_what_llama_cpp_has_no_place_for(
    tmp_path: Path, family: str, shape: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    base = save_model(tmp_path / "base", family, **shape)
    save_adapter(base, tmp_path / "adapter", **settings)
    with pytest.raises(UserError) as refused:
        to_gguf(tmp_path / "adapter", base, tmp_path / "a.gguf")
    assert message in str(refused.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
