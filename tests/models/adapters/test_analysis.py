"""Figures of adapters against matrices that are formed in full."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from jllm.errors import UserError
from jllm.models.adapters.adapter_files import CONFIG_NAME, WEIGHTS_NAME
from jllm.models.adapters.analysis import ModuleFacts, analyse


def write(folder: Path, pairs: dict[str, tuple[torch.Tensor, torch.Tensor]], **fields: Any) -> Path:
    folder.mkdir(exist_ok=True)
    tensors = {}
    for module, (first, second) in pairs.items():
        tensors |= {
            f"base_model.model.{module}.lora_A.weight": first,
            f"base_model.model.{module}.lora_B.weight": second,
        }
    save_file(tensors, folder / WEIGHTS_NAME)
    (folder / CONFIG_NAME).write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, **fields}))
    return folder


def expected(change: np.ndarray[Any, Any]) -> tuple[float, float, float]:
    values = np.linalg.svd(change, compute_uv=False)
    shares = values[values > 1e-9 * values[0]] / values.sum()
    return float(np.linalg.norm(change)), float(values[0]), math.exp(-float((shares * np.log(shares)).sum()))


def close(found: ModuleFacts, change: np.ndarray[Any, Any]) -> None:
    frobenius, spectral, rank = expected(change)
    np.testing.assert_allclose([found.frobenius, found.spectral], [frobenius, spectral], rtol=1e-5)
    np.testing.assert_allclose(found.effective_rank, rank, rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(
    rank=st.integers(1, 6), inputs=st.integers(1, 9), outputs=st.integers(1, 9), seed=st.integers(0, 99),
    rslora=st.booleans(),
)  # fmt: skip
def test_figures_are_those_of_the_whole_matrix(
    tmp_path_factory: pytest.TempPathFactory, rank: int, inputs: int, outputs: int, seed: int, rslora: bool
) -> None:
    torch.manual_seed(seed)
    first, second = torch.randn(rank, inputs), torch.randn(outputs, rank)
    folder = write(tmp_path_factory.mktemp("adapter"), {"model.layers.0.q": (first, second)}, r=rank, use_rslora=rslora)
    [found] = analyse(folder).modules
    scaling = 8 / (math.sqrt(rank) if rslora else rank)
    close(found, scaling * (second @ first).numpy().astype(float))
    cosines = torch.nn.functional.normalize(first.double(), dim=1)
    gram = cosines @ cosines.T
    others = gram[~torch.eye(rank, dtype=torch.bool)]
    assert found.parallel_a == pytest.approx(float(others.square().mean().sqrt()) if rank > 1 else 0.0, abs=1e-6)


def test_orthogonal_and_parallel(tmp_path: Path) -> None:
    orthogonal = torch.linalg.qr(torch.randn(9, 4)).Q.contiguous()
    parallel = torch.ones(9, 4) * torch.tensor([1.0, -2.0, 3.0, 0.5])
    pairs = {
        "model.layers.0.a": (orthogonal.T.contiguous(), orthogonal),
        "model.layers.1.a": (parallel.T.contiguous(), parallel),
    }
    first, second = analyse(write(tmp_path / "x", pairs)).modules
    assert (first.parallel_a, first.parallel_b) == pytest.approx((0, 0), abs=1e-6)
    assert (second.parallel_a, second.parallel_b) == pytest.approx((1, 1), abs=1e-6)
    assert first.effective_rank == pytest.approx(4, abs=1e-5)
    assert second.effective_rank == pytest.approx(1, abs=1e-5)
    assert first.singular_values == pytest.approx((2.0,) * 4)
    assert first.share + second.share == pytest.approx(1)


def test_a_fresh_adapter_changes_nothing(tmp_path: Path) -> None:
    facts = analyse(write(tmp_path / "x", {"model.layers.0.a": (torch.randn(4, 5), torch.zeros(6, 4))}))
    [found] = facts.modules
    assert (found.frobenius, found.spectral, found.effective_rank, found.share, facts.frobenius) == (0, 0, 0, 0, 0)


def test_of_every_kind_of_module(tmp_path: Path) -> None:
    """Against peft's own changes: ranks and alphas of their own, embeddings, packed experts, a head trained whole."""
    pytest.importorskip("peft", reason="peft is not installed: pip install .[adapters]")
    from peft.tuners.lora import LoraLayer

    from tests.models.adapters.adapted import save_adapter, save_model

    base = save_model(tmp_path / "base", "qwen3_moe", tied=False)
    adapted = save_adapter(
        base, tmp_path / "adapter", target_modules=["q_proj", "v_proj", "embed_tokens"], modules_to_save=["lm_head"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 3}, alpha_pattern={"v_proj": 5},
    )  # fmt: skip
    facts = analyse(tmp_path / "adapter")
    changes = []
    for layer in adapted.modules():
        if isinstance(layer, LoraLayer):
            changes.append(layer.get_delta_weight("default").detach().numpy().astype(float))
    norms = sorted(float(np.linalg.norm(change)) for change in changes)
    np.testing.assert_allclose(sorted(each.frobenius for each in facts.modules), norms, rtol=1e-5)
    spectral = sorted(float(np.linalg.svd(change, compute_uv=False).max()) for change in changes)
    np.testing.assert_allclose(sorted(each.spectral for each in facts.modules), spectral, rtol=1e-5)
    assert {each.experts for each in facts.modules} == {1, 4}
    assert facts.whole == ("lm_head.weight", "model.embed_tokens.base_layer.weight")
    assert facts.parameters == sum(tensor.numel() for tensor in load_file(tmp_path / "adapter" / WEIGHTS_NAME).values())


def test_control_adapters(tmp_path: Path) -> None:
    """Against the matrix that multiplies what a layer adds."""
    torch.manual_seed(1)
    directions, strengths = torch.linalg.qr(torch.randn(9, 4)).Q.contiguous(), torch.randn(4)
    folder = write(tmp_path / "x", {}, peft_type="CONTROL")
    layer = "base_model.model.model.layers.7"
    save_file({f"{layer}.control_Q": directions, f"{layer}.control_S": strengths}, folder / WEIGHTS_NAME)
    facts = analyse(folder)
    [found] = facts.modules
    assert (facts.kind, found.name, found.layer) == ("CONTROL", "model.layers.7.control", 7)
    close(found, (directions @ torch.diag(torch.expm1(strengths)) @ directions.T).numpy().astype(float))
    assert found.parallel_a == pytest.approx(0, abs=1e-5)
    assert found.spectral == pytest.approx(float(torch.expm1(strengths).abs().max()), rel=1e-5)


@pytest.mark.parametrize(
    ("pairs", "fields", "message"),
    [
        ({"a": (torch.zeros(4, 5), torch.zeros(6, 3))}, {}, "a has 4 rows in A and 3 columns in B"),
        ({"a": (torch.zeros(4, 5), torch.zeros(6, 4))}, {"r": 3}, "its rank is 3 by the configuration"),
        ({"a": (torch.full((4, 5), math.nan), torch.zeros(6, 4))}, {}, "holds NaN"),
        ({}, {}, "no adapter of any module"),
        ({}, {"peft_type": "IA3"}, "an adapter of type 'IA3'"),
    ],
)
def test_mistakes(tmp_path: Path, pairs: dict[str, Any], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refused:
        analyse(write(tmp_path / "x", pairs, **fields))
    assert message in str(refused.value)
