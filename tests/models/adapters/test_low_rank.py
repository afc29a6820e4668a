"""An adapter's changes are peft's own, whole or some rows at a time, under the names of the model's parameters."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft", reason="peft is not installed: pip install .[adapters]")

from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper

from jllm.errors import UserError
from jllm.models.adapters.low_rank import read_changes
from jllm.models.weights.source import causal_class, read_config
from tests.models.adapters.adapted import save_adapter, save_model

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def changes_of(base: Path, adapter: Path) -> Any:
    config = read_config(base)
    return read_changes(adapter, config, causal_class(config), user="this test")


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "rank_pattern": {"q_proj": 2}}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_rslora": True}),
        ("qwen3_moe", {"target_modules": ["v_proj"], "target_parameters": [*EXPERTS, "mlp.gate.weight"]}),
        ("gpt_oss", {"target_modules": ["v_proj"], "target_parameters": EXPERTS}),
    ],
)
def test_changes_are_those_of_peft(tmp_path: Path, family: str, settings: dict[str, Any]) -> None:
    base = save_model(tmp_path / "base", family, **({"tied": False} if family == "llama" else {}))
    adapted = save_adapter(base, tmp_path / "adapter", **settings)
    found = changes_of(base, tmp_path / "adapter").low_rank
    expected = {}
    for name, layer in adapted.named_modules():
        if isinstance(layer, LoraLayer):
            leaf = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
            module = name.removeprefix("base_model.model.").replace(".base_layer", "")
            expected[f"{module}.{leaf}"] = layer.get_delta_weight("default").detach()
    assert found.keys() == expected.keys()
    for name, change in found.items():
        whole = expected[name]
        assert change.shape == tuple(whole.shape)
        torch.testing.assert_close(change.rows(0, whole.shape[0]), whole, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(change.rows(1, 3), whole[1:3], atol=1e-6, rtol=1e-5)


def test_what_takes_the_place_of_others(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "qwen2")
    settings: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "bias": "all"}
    save_adapter(base, tmp_path / "adapter", **settings)
    found = changes_of(base, tmp_path / "adapter")
    biases = {f"model.layers.{layer}.self_attn.{leaf}_proj.bias" for layer in range(4) for leaf in "qkv"}
    assert found.replaced.keys() == biases | {"lm_head.weight"}
    assert found.unlike_sums() == "lm_head.weight, trained whole"


@pytest.mark.parametrize("name", ["trainable_token_indices", "lora_bias"])
def test_settings_that_nothing_here_has(tmp_path: Path, name: str) -> None:
    base = save_model(tmp_path / "base", "qwen2")
    given: dict[str, Any] = {"trainable_token_indices": [3]} if name != "lora_bias" else {"lora_bias": True}
    save_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], **given)
    with pytest.raises(UserError, match=f"its {name} is .*, which this test does not have"):
        changes_of(base, tmp_path / "adapter")
