"""A merged model computes what peft computes with the adapter, and all that has no adapter keeps every byte."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("peft", reason="peft is not installed: pip install .[adapters]")

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from jllm.errors import UserError
from jllm.models.adapters.merging import merge
from jllm.models.weights.source import weight_files
from tests.models.adapters.adapted import logits, logits_of, save_adapter, save_model

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {"target_modules": LINEAR}),
    "ranks of their own": (
        "llama",
        {"tied": False},
        {"target_modules": LINEAR, "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7},
         "alpha_pattern": {"down_proj": 3}, "use_rslora": True},
    ),
    "DoRA": ("llama", {}, {"target_modules": [*LINEAR, "embed_tokens"], "use_dora": True}),
    "tied head": ("llama", {"tied": True}, {"target_modules": ["q_proj", "lm_head"]}),
    "tied embedding": ("llama", {"tied": True}, {"target_modules": ["q_proj", "embed_tokens"]}),
    "both of a pair": ("llama", {"tied": True}, {"target_modules": ["embed_tokens", "lm_head"]}),
    "head trained whole": ("llama", {"tied": True}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "head and embedding": ("llama", {"tied": False}, {"target_modules": ["embed_tokens", "v_proj", "lm_head"]}),
    "biases": ("qwen2", {}, {"target_modules": ["q_proj", "o_proj"], "bias": "all"}),
    "biases of targets": ("qwen2", {}, {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "gpt2": ("gpt2", {}, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "gpt2, DoRA": ("gpt2", {}, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True}),
    "phi3": ("phi3", {}, {"target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}),
    "mixtral": ("mixtral", {}, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "one side of a conversion": ("mixtral", {}, {"target_modules": ["v_proj"], "target_parameters": EXPERTS[:1]}),
    "qwen3_moe": ("qwen3_moe", {}, {"target_modules": ["o_proj"], "target_parameters": EXPERTS}),
    "router": ("qwen3_moe", {}, {"target_modules": ["q_proj"], "target_parameters": ["mlp.gate.weight"]}),
    "gpt_oss": ("gpt_oss", {}, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "gemma2": ("gemma2", {}, {"target_modules": LINEAR}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_computes_what_peft_computes(tmp_path: Path, case: str) -> None:
    family, settings, adapter = CASES[case]
    base = save_model(tmp_path / "base", family, **settings)
    adapted = save_adapter(base, tmp_path / "adapter", **adapter)
    expected = logits(adapted)
    assert (expected - logits_of(base)).abs().max() > 1e-2, "the adapter does something"
    merge(base, tmp_path / "adapter", tmp_path / "merged")
    torch.testing.assert_close(logits_of(tmp_path / "merged"), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("layout", ["one file", "shards", "pickled"])
def test_what_has_no_adapter_keeps_every_byte(tmp_path: Path, layout: str) -> None:
    """Types too, and files beside the weights; the folder is cut as the model was."""
    base = save_model(tmp_path / "base", "llama", tied=False, max_shard_size="20KB" if layout == "shards" else "5GB")
    (base / "tokenizer.json").write_text("{}")
    (base / "chat_template.jinja").write_text("{{ x }}")
    if layout == "pickled":
        tensors = load_file(base / "model.safetensors")
        torch.save(tensors, base / "pytorch_model.bin")
        (base / "model.safetensors").unlink()
    else:
        tensors = {name: tensor for path in weight_files(base) for name, tensor in load_file(path).items()}
    name = "model.norm.weight"
    save_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    if layout == "one file":  # a type of its own
        save_file(tensors | {name: tensors[name].half()}, base / "model.safetensors", {"format": "pt"})
        tensors[name] = tensors[name].half()
    merge(base, tmp_path / "adapter", tmp_path / "merged")
    files = weight_files(tmp_path / "merged")
    assert len(files) == (len(weight_files(base)) if layout != "pickled" else 1)
    found = {name: tensor for path in files for name, tensor in load_file(path).items()}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor) == ("q_proj" not in name), name
    for path in base.iterdir():
        if path.suffix in (".json", ".jinja") and "index" not in path.name:
            assert (tmp_path / "merged" / path.name).read_bytes() == path.read_bytes()


def test_added_and_taken_away(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "llama", tied=False)
    save_adapter(base, tmp_path / "adapter", target_modules=LINEAR)
    merge(base, tmp_path / "adapter", tmp_path / "less", scale=-1)
    merge(tmp_path / "less", tmp_path / "adapter", tmp_path / "again")
    before, less, again = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "less", "again"))
    for name, tensor in before.items():
        torch.testing.assert_close(again[name], tensor, atol=1e-6, rtol=0)
        assert torch.equal(less[name], tensor) == (not any(f"{leaf}." in name for leaf in LINEAR))


def test_half_of_an_adapter(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "llama")
    adapted = save_adapter(base, tmp_path / "adapter", target_modules=LINEAR)
    merge(base, tmp_path / "adapter", tmp_path / "merged", scale=0.5)
    for layer in adapted.modules():
        if isinstance(layer, LoraLayer):
            layer.set_scale("default", 0.5)
    torch.testing.assert_close(logits_of(tmp_path / "merged"), logits(adapted), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["bf16", "nf4", "fp4", "int8"])
def test_rounding(tmp_path: Path, kind: str) -> None:
    """A model in bf16 or less, merged to bf16, is off by at most twice what rounding alone does to the model."""
    plain = save_model(tmp_path / "plain", "llama", tied=False, hidden_size=64, intermediate_size=128, head_dim=16)
    base = tmp_path / "base"
    if kind == "bf16":
        AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16).save_pretrained(base)
    else:
        pytest.importorskip("bitsandbytes")
        pytest.importorskip("accelerate")
        how = {"nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
               "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
               "int8": {"load_in_8bit": True}}[kind]  # fmt: skip
        settings = BitsAndBytesConfig(**how)
        whole = AutoModelForCausalLM.from_pretrained(plain, quantization_config=settings, dtype=torch.bfloat16)
        whole.save_pretrained(base)
    save_adapter(plain, tmp_path / "adapter", target_modules=LINEAR)
    merge(base, tmp_path / "adapter", tmp_path / "merged")
    saved = json.loads((tmp_path / "merged/config.json").read_text())
    assert (saved["dtype"], "quantization_config" in saved) == ("bfloat16", False)
    # The exact model: the base's values in fp32, and the adapter on them.
    exact = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    values = load_file(base / "model.safetensors")
    with torch.no_grad():
        for name, parameter in exact.named_parameters():
            parameter.copy_(values[name] if kind == "bf16" else dequantised(values, name))
    coarse = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16)
    coarse.load_state_dict({name: value.bfloat16() for name, value in exact.state_dict().items()})
    of_rounding = (logits(coarse.eval()) - logits(exact.eval())).abs()
    expected = logits(PeftModel.from_pretrained(exact, tmp_path / "adapter").eval())
    found = (logits_of(tmp_path / "merged", torch.bfloat16) - expected).abs()
    assert found.mean() <= 2 * of_rounding.mean()


def dequantised(values: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """A weight by bitsandbytes' own reading of the file."""
    from bitsandbytes import functional

    packed = values[name]
    if packed.dtype == torch.int8:
        scales: torch.Tensor = values[name.replace("weight", "SCB")]
        return packed.float() * scales[:, None] / 127
    if packed.dtype != torch.uint8:
        return packed.float()
    state = {each: tensor for each, tensor in values.items() if each.startswith(name + ".")}
    read = functional.QuantState.from_dict(state, device=torch.device("cpu"))
    read.dtype = torch.float32
    return functional.dequantize_4bit(packed, read).reshape(read.shape)


@pytest.mark.parametrize(
    ("settings", "scale", "message"),
    [
        ({"use_dora": True}, -1.0, "--scale -1: the adapter has DoRA"),
        ({"modules_to_save": ["lm_head"]}, 0.5, "--scale 0.5: the adapter has lm_head.weight, trained whole"),
        ({"layer_replication": [[0, 2], [1, 4]]}, 1.0, "its layer_replication is"),
    ],
)
def test_what_cannot_be_merged_so(tmp_path: Path, settings: dict[str, Any], scale: float, message: str) -> None:
    base = save_model(tmp_path / "base", "llama", tied=False)
    save_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], **settings)
    with pytest.raises(UserError) as refused:
        merge(base, tmp_path / "adapter", tmp_path / "merged", scale=scale)
    assert message in str(refused.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"], "nothing is left"


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_what_its_type_cannot_hold(tmp_path: Path, family: str) -> None:
    """In fp16 a sum may be infinite; nothing is written then, of a tensor as it is or of a converted one."""
    base = save_model(tmp_path / "base", family, dtype=torch.float16)
    targets: dict[str, Any] = {"target_modules": ["q_proj"]}
    if family == "mixtral":
        targets = {"target_modules": [], "target_parameters": EXPERTS}
    save_adapter(base, tmp_path / "adapter", **targets)
    with pytest.raises(UserError, match="would hold infinity or NaN with the adapter in it, in F16"):
        merge(base, tmp_path / "adapter", tmp_path / "merged", scale=1e6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"], "nothing is left"


def test_an_adapter_of_another_model(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "llama", tied=False)
    other = save_model(tmp_path / "other", "llama", tied=False, hidden_size=64)
    save_adapter(other, tmp_path / "adapter", target_modules=["q_proj"])
    with pytest.raises(UserError, match=r"q_proj.lora_A.weight is \[4, 64\], --model needs \[4, 32\]"):
        merge(base, tmp_path / "adapter", tmp_path / "merged")


def test_a_base_that_is_cut_or_lacks_a_tensor(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "llama", tied=False)
    save_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    path = base / "model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor for name, tensor in tensors.items() if "layers.1.self_attn.q_proj" not in name}, path)
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.q_proj\.weight is in none of the base's files"):
        merge(base, tmp_path / "adapter", tmp_path / "merged")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="bytes, and the file has"):
        merge(base, tmp_path / "adapter", tmp_path / "merged")
