"""Norms, decay and limit of BA against the matrices themselves, for every kind of adapter."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("peft", reason="peft is not installed: pip install .[adapters]")

from torch import Tensor, nn

from jllm.models.adapters.lora import attach_lora
from jllm.models.adapters.lora_plan import LoraChoice, plan_lora
from jllm.models.adapters.lora_products import LoraProducts, Product, products_of
from jllm.models.weights.source import causal_class, read_config
from tests.models.chain import load_chain
from tests.models.family_check import make_folder
from tests.models.tiny import tiny_config

CASES = {
    "linear": ("llama", {"targets": "all-linear", "use_rslora": True}),
    "embedding and head": ("llama", {"targets": "embed_tokens,lm_head,q_proj"}),
    "packed experts": ("qwen3_moe", {"targets": "experts,q_proj"}),
    "transposed": ("gpt2", {"targets": "all-linear"}),
    "DoRA": ("llama", {"targets": "q_proj,down_proj", "use_dora": True}),
}


def adapted(folder: Path, case: str) -> nn.Module:
    """A model whose second matrices are not 0."""
    family, choice = CASES[case]
    make_folder(tiny_config(family), folder)
    config = read_config(folder)
    plan = plan_lora(config, causal_class(config), LoraChoice(rank=3, alpha=6.0, **choice))  # type: ignore[arg-type]
    [stage] = load_chain(folder, [0, 4])
    attach_lora(stage.model, plan, seed=1, dtype=torch.float32)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(stage.model.named_parameters()):
            if "lora_" in name and "magnitude" not in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(number))
    return stage.model


def dense(model: nn.Module) -> list[Tensor]:
    """What peft itself adds to each weight, an expert each, in the order of `products_of`."""
    found: list[Tensor] = []
    for name in dict.fromkeys(product.name for product in products_of(model)):
        delta = model.get_submodule(name).get_delta_weight("default")  # type: ignore[operator]
        found += list(delta.detach()) if delta.ndim == 3 else [delta.detach()]
    return found


@pytest.mark.parametrize("case", CASES)
def test_norms_are_those_of_what_is_added(tmp_path: Path, case: str) -> None:
    model = adapted(tmp_path, case)
    by_name: dict[str, list[float]] = {}
    products = LoraProducts(model)
    for name, norm in zip(products.names, products.norms().tolist(), strict=True):
        by_name.setdefault(name, []).append(norm)
    expected: dict[str, list[float]] = {}
    for product, delta in zip(products_of(model), dense(model), strict=True):
        expected.setdefault(product.label, []).append(float(delta.norm()))
    assert by_name.keys() == expected.keys()
    for name, norms in expected.items():
        assert by_name[name] == pytest.approx(norms, rel=1e-5), name


@pytest.mark.parametrize("case", CASES)
def test_one_step_of_decay_is_the_formula(tmp_path: Path, case: str) -> None:
    """Both from the A and B before it, each with its own rate."""
    model = adapted(tmp_path, case)
    before = [(product.first.clone(), product.second.clone()) for product in products_of(model)]
    firsts = {id(product.owners[0]) for product in products_of(model)}
    LoraProducts(model).decay(0.7, lambda parameter: 0.01 if id(parameter) in firsts else 0.04)
    for (a, b), product in zip(before, products_of(model), strict=True):
        torch.testing.assert_close(product.first, a - 0.01 * 0.7 * b.T @ b @ a, atol=1e-6, rtol=0)
        torch.testing.assert_close(product.second, b - 0.04 * 0.7 * b @ a @ a.T, atol=1e-6, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_the_limit_is_held_and_directions_are_kept(tmp_path: Path, case: str) -> None:
    model = adapted(tmp_path, case)
    before = dense(model)
    most = sorted(float(delta.norm()) for delta in before)[len(before) // 2]
    LoraProducts(model).limit(most)
    assert float(LoraProducts(model).norms().max()) <= most + 1e-4
    for delta, left in zip(before, dense(model), strict=True):
        expected = delta * min(1.0, most / float(delta.norm()))
        torch.testing.assert_close(left, expected, atol=1e-5, rtol=1e-4)


def test_what_is_not_finite_is_seen(tmp_path: Path) -> None:
    model = adapted(tmp_path, "linear")
    first = next(products_of(model))
    assert isinstance(first, Product)
    with torch.no_grad():
        first.owners[1][0, 0] = float("nan")
    products = LoraProducts(model)
    products.limit(0.1)
    assert [name for name, norm in zip(products.names, products.norms().tolist(), strict=True) if norm != norm] == [
        first.label
    ]


def test_a_stage_without_adapters(tmp_path: Path) -> None:
    make_folder(tiny_config("llama"), tmp_path)
    [stage] = load_chain(tmp_path, [0, 4])
    products = LoraProducts(stage.model)
    products.decay(1.0, lambda parameter: 1.0)
    products.limit(1.0)
    assert products.names == products.norms().tolist() == []
