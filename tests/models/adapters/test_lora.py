"""Adapters on stages: names, initial values, what trains, and nothing is computed differently before a step."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("peft", reason="peft is not installed: pip install .[adapters]")

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer

from jllm.models.adapters.lora import _multiply_in_input_type, attach_lora, is_adapter
from jllm.models.adapters.lora_plan import ADAPTER, LoraChoice, LoraPlan, plan_lora
from jllm.models.pipeline.carving import published_names
from jllm.models.pipeline.stage import PipelineStage
from jllm.models.weights.source import causal_class, read_config
from tests.fixtures import tiny_llama
from tests.models.chain import chained_loss_and_gradients, load_chain, packed_batch

SPLITS = ([0, 4], [0, 2, 4], [0, 1, 3, 4])


def adapted(folder: Path, boundaries: list[int], *, seed: int = 1, **choice: object) -> list[PipelineStage]:
    stages = load_chain(folder, boundaries)
    for stage in stages:
        attach_lora(stage.model, plan_of(folder, **choice), seed=seed, dtype=torch.float32)
    return stages


def plan_of(folder: Path, **choice: object) -> LoraPlan:
    config = read_config(folder)
    return plan_lora(config, causal_class(config), LoraChoice(**{"rank": 4, "alpha": 8.0, **choice}))  # type: ignore[arg-type]


def parameters_of(stages: list[PipelineStage]) -> dict[str, torch.nn.Parameter]:
    found = {}
    for stage in stages:
        names = published_names(stage.model, stage.span)
        found |= {names[name]: parameter for name, parameter in stage.model.named_parameters()}
    return found


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
@pytest.mark.parametrize("targets", ["all-linear", "all-linear,lm_head,embed_tokens"])
def test_any_number_of_stages_starts_alike(tmp_path: Path, init: str, targets: str) -> None:
    tiny_llama(tmp_path, tied=True)
    drawn = []
    for boundaries in SPLITS:
        found = parameters_of(adapted(tmp_path, boundaries, init=init, targets=targets))
        drawn.append({name: value for name, value in found.items() if is_adapter(name)})
    assert drawn[0].keys() == drawn[1].keys() == drawn[2].keys()
    for name, value in drawn[0].items():
        assert all(torch.equal(value, other[name]) for other in drawn), name
    first = torch.cat([value.detach().flatten() for name, value in drawn[0].items() if "lora_A" in name])
    other = parameters_of(adapted(tmp_path, SPLITS[0], init=init, targets=targets, seed=2))
    assert not torch.equal(first, torch.cat([v.detach().flatten() for n, v in other.items() if "lora_A" in n]))
    expected = 1 / 4 if init == "gaussian" else None
    if expected is not None:
        assert abs(float(first.std()) - expected) < 0.02


@pytest.mark.parametrize("use_dora", [False, True])
def test_nothing_changes_before_the_first_step(tmp_path: Path, use_dora: bool) -> None:
    """The loss is that of the model, and the model's parameters have the names they had."""
    tiny_llama(tmp_path, tied=True)
    ids, integers = packed_batch(97)
    plain = load_chain(tmp_path, [0, 2, 4])
    expected, _ = chained_loss_and_gradients(plain, ids, integers)
    stages = adapted(tmp_path, [0, 2, 4], use_dora=use_dora)
    found, gradients = chained_loss_and_gradients(stages, ids, integers)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    names = parameters_of(stages)
    assert {name for name in names if not is_adapter(name)} == parameters_of(plain).keys()
    assert gradients.keys() == {name for name in names if is_adapter(name)}, "the model is frozen"


def test_a_module_is_trained_whole(tmp_path: Path) -> None:
    tiny_llama(tmp_path, tied=True)
    names = parameters_of(adapted(tmp_path, [0, 2, 4], saved="lm_head"))
    assert names["lm_head.modules_to_save.weight"].requires_grad
    assert not names["model.embed_tokens.weight"].requires_grad
    assert torch.equal(names["lm_head.modules_to_save.weight"], names["model.embed_tokens.weight"])


def test_products_in_the_type_of_the_input_are_those_of_autocast() -> None:
    """A bf16 layer with fp32 adapters: outputs and gradients are those that peft gives under `torch.autocast`."""
    found: dict[bool, list[torch.Tensor]] = {}
    for is_ours in (False, True):
        torch.manual_seed(0)
        model = torch.nn.ModuleDict({"linear": torch.nn.Linear(24, 40, bias=False, dtype=torch.bfloat16)})
        inject_adapter_in_model(LoraConfig(r=4, lora_alpha=8, target_modules=["linear"]), model, ADAPTER)
        layer = model["linear"]
        assert isinstance(layer, LoraLayer)
        torch.nn.init.normal_(layer.lora_B[ADAPTER].weight)
        trained = [layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight]
        for each in trained:
            each.data = each.data.float()
        if is_ours:
            _multiply_in_input_type(layer)
            assert [layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight] == trained
        inputs = torch.randn(16, 24).to(torch.bfloat16).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not is_ours):
            output = layer(inputs)
        assert output.dtype == torch.bfloat16
        gradients = torch.autograd.grad(output.float().square().sum(), [inputs, *trained])
        assert [each.dtype for each in gradients] == [torch.bfloat16, torch.float32, torch.float32]
        found[is_ours] = [output.detach(), *gradients]
    assert all(torch.equal(one, other) for one, other in zip(found[False], found[True], strict=True))
