"""Model folders: facts without loading, only a stage's own tensors read, every mistake one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from jllm.errors import UserError
from jllm.models.pipeline.span import StageSpan
from jllm.models.weights import loading
from jllm.models.weights.source import bare_model, model_info, read_config, weight_of_quantised
from tests.models.tiny import tiny_config

WHOLE = StageSpan(index=0, count=1, first_layer=0, end_layer=4)


def test_info(folder: Path) -> None:
    info = model_info(folder)
    assert (info.vocab_size, info.num_layers) == (96, 4)
    assert info.dtype == torch.bfloat16
    assert info.model_type == "llama"
    assert not info.tied


def test_mistakes_are_one_line(folder: Path, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(folder, tmp_path / name))

    def refuse(path: Path, says: str, span: StageSpan = WHOLE) -> None:
        with pytest.raises(UserError, match=says) as caught:
            loading.load_stage(path, span, dtype=torch.float32)
        assert "\n" not in str(caught.value)

    refuse(tmp_path / "nowhere", "does not exist")
    bare = copy("bare")
    (bare / "model.safetensors").unlink()
    refuse(bare, "no weights")
    (bare / "config.json").unlink()
    refuse(bare, "no config.json")
    broken = copy("broken")
    (broken / "config.json").write_text("{")
    refuse(broken, "not valid JSON")
    strange = copy("strange")
    (strange / "config.json").write_text('{"model_type": "lama"}')
    refuse(strange, 'Did you mean "llama"')
    (strange / "config.json").write_text('{"model_type": "vit"}')
    refuse(strange, "no causal language model")
    larger = copy("larger")
    config = json.loads((folder / "config.json").read_text())
    (larger / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    refuse(larger, "missing", StageSpan(index=1, count=2, first_layer=3, end_layer=5))
    (larger / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    refuse(larger, "do not fit its config.json")
    cut = copy("cut")
    (cut / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:2000])
    refuse(cut, "cannot be read|not a safetensors")
    refuse(folder, "at least one layer", StageSpan(index=1, count=2, first_layer=4, end_layer=4))
    index = copy("index")
    (index / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    refuse(index, "missing")
    (strange / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}')
    with pytest.raises(UserError, match="trust_remote_code"):
        read_config(strange)


def refused(folder: Path) -> str:
    """The one line with which a folder is refused, before a run starts and where weights are loaded."""
    said = set()
    for load in (
        lambda: model_info(folder),
        lambda: loading.load_stage(folder, WHOLE, dtype=torch.float32),
    ):
        with pytest.raises(UserError) as caught:
            load()
        said.add(str(caught.value))
    (line,) = said
    assert "\n" not in line
    assert "give the folder of the model in bf16" in line
    return line


QUANTISED = {
    "fp8 in blocks": {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"},
    "compressed": {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}},
    "older bitsandbytes": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    **{method: {"quant_method": method} for method in AUTO_QUANTIZATION_CONFIG_MAPPING},
}


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_every_quantised_source_is_refused_by_name(folder: Path, tmp_path: Path, name: str, key: str) -> None:
    """Whatever the method, by config.json alone; also where a part of the model is quantised, and with --init."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    for changed in ({**config, key: QUANTISED[name]}, {**config, "text_config": {key: QUANTISED[name]}}):
        (copy / "config.json").write_text(json.dumps(changed))
        line = refused(copy)
        assert str(copy / "config.json") in line
        assert key in line
        assert str(QUANTISED[name].get("quant_method", key.removesuffix("_config"))) in line
        with pytest.raises(UserError, match="quantised weights"):
            model_info(copy, with_weights=False)
    (copy / "config.json").write_text(json.dumps({**config, key: None}))
    assert model_info(copy).num_layers == 4


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_only_what_bitsandbytes_has_quantised_will_do(folder: Path, tmp_path: Path, name: str, key: str) -> None:
    """And that of the whole model only, where adapters are trained beside it; elsewhere the line names them."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    is_known = name == "older bitsandbytes" and key == "quantization_config"
    (copy / "config.json").write_text(json.dumps({**config, "text_config": {key: QUANTISED[name]}}))
    with pytest.raises(UserError, match="quantised weights"):
        read_config(copy, quantised=True)
    (copy / "config.json").write_text(json.dumps({**config, key: QUANTISED[name]}))
    assert ("or --lora_dim, to train adapters" in refused(copy)) == is_known
    if is_known:
        assert not hasattr(read_config(copy, quantised=True), "quantization_config")
        return
    with pytest.raises(UserError, match="quantised weights"):
        read_config(copy, quantised=True)


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("a.up_proj.weight.absmax", "a.up_proj.weight"),
        ("a.up_proj.weight.quant_state.bitsandbytes__nf4", "a.up_proj.weight"),
        ("a.up_proj.SCB", "a.up_proj.weight"),
        ("a.up_proj.weight_format", "a.up_proj.weight"),
        ("a.up_proj.weight", "a.up_proj.weight"),
        ("a.weight.other.bias", "a.weight.other.bias"),
    ],
)
def test_weights_that_tensors_belong_to(name: str, weight: str) -> None:
    assert weight_of_quantised(name) == weight


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("model.layers.1.mlp.up_proj.weight", torch.zeros(4, 4, dtype=torch.float8_e4m3fn)),
        ("model.layers.1.mlp.up_proj.weight_scale_inv", torch.ones(1, 1)),
        ("model.layers.1.mlp.up_proj.weight_scale", torch.ones(4)),
        ("model.layers.1.mlp.experts.gate_up_proj_blocks", torch.zeros(4, 4, dtype=torch.uint8)),
        ("model.layers.1.mlp.experts.gate_up_proj_scales", torch.zeros(4, dtype=torch.uint8)),
        ("model.layers.1.mlp.up_proj.SCB", torch.ones(4)),
        ("model.layers.1.mlp.up_proj.weight.absmax", torch.ones(4)),
        ("model.layers.1.mlp.up_proj.weight.quant_state.bitsandbytes__nf4", torch.zeros(4, dtype=torch.uint8)),
        ("model.layers.1.mlp.up_proj.qweight", torch.zeros(4, 4, dtype=torch.int32)),
        ("model.layers.1.mlp.up_proj.weight_packed", torch.zeros(4, 4, dtype=torch.int32)),
    ],
)
def test_quantised_weights_are_refused_whatever_the_configuration_says(
    folder: Path, tmp_path: Path, name: str, tensor: torch.Tensor
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    save_file({**load_file(folder / "model.safetensors"), name: tensor}, copy / "model.safetensors", {"format": "pt"})
    assert f"holds {name} (" in refused(copy)


class NeedsPackage(LlamaForCausalLM):
    def __init__(self, config: object) -> None:
        raise ImportError("the model requires\nthe timm library")


def test_a_package_that_is_not_here_is_one_line() -> None:
    with pytest.raises(UserError, match="no NeedsPackage can be built") as raised:
        bare_model(tiny_config("llama"), NeedsPackage, dtype=torch.float32)
    assert "ImportError: the model requires the timm library" in str(raised.value)
