"""Control adapters on stages compute, and pass back, what the formula does on the whole model."""

import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from jllm.errors import UserError
from jllm.models.activation_checkpointing import checkpoint_activations
from jllm.models.adapters.control import ControlAdapters, attach_control, change
from jllm.models.pipeline.bundle import CONTROL_CLASS, READ
from jllm.models.pipeline.carving import structure_of
from jllm.models.pipeline.span import spans_of
from jllm.models.pipeline.stage import PipelineStage
from jllm.models.weights.loading import load_stage
from tests.models.adapters.whole_control import WholeControl
from tests.models.chain import (
    chained_loss_and_gradients,
    packed_batch,
    token_objective,
    whole_loss_and_gradients,
    worst_gradient,
)
from tests.models.family_check import make_folder
from tests.models.tiny import tiny_config

torch.set_num_threads(1)
WIDTH, RANK = 32, 4
FAMILIES = ("llama", "gpt2", "gemma2", "mixtral", "cohere2", "phi3", "glm4", "qwen3_next")
SOME = FAMILIES if float(os.environ.get("JLLM_TEST_SIZE", "1")) > 1 else FAMILIES[:5]
CHECKPOINTING: dict[str, dict[str, Any] | None] = {
    "none": None,
    "each layer": {"interval": 1},
    "pairs, offloaded": {"interval": 2, "offload": True},
    "attention": {"attention_only": True},
}


def stages_of(
    folder: Path, boundaries: list[int], ways: dict[str, Any] | None = None, **more: Any
) -> list[PipelineStage]:
    """Stages with control adapters whose strengths are not 0."""
    found = []
    for span in spans_of(boundaries):
        model = load_stage(folder, span, dtype=torch.float32)
        prefix = structure_of(model).layers
        options = {"rank": RANK, "prefix": prefix, "layers": range(4), "width": WIDTH, "seed": 1, **more}
        classes = attach_control(model, dtype=torch.float32, **options)
        if ways is not None:
            checkpoint_activations(model, span, **ways)
        for name, parameter in model.named_parameters():
            if name.endswith("control_S"):
                generator = torch.Generator().manual_seed(int(name.split(".")[-2]))
                parameter.data.copy_(torch.empty(RANK).normal_(std=0.5, generator=generator))
        stage = PipelineStage(
            model, span, token_objective, read=(*READ, CONTROL_CLASS), is_frozen=True, tell=classes.tell
        )
        found.append(stage.train())
    return found


def batch_with_classes(*, packed: bool = True, seed: int = 0) -> tuple[Tensor, Tensor]:
    ids, integers = packed_batch(90, packed=packed)
    classes = torch.randint(-1, 2, ids.shape, generator=torch.Generator().manual_seed(seed))
    return ids, torch.cat([integers, classes[None]])


def values_of(stages: list[PipelineStage]) -> dict[str, tuple[Tensor, Tensor]]:
    found: dict[str, Tensor] = {}
    for stage in stages:
        found |= {name: parameter.detach() for name, parameter in stage.model.named_parameters() if "control_" in name}
    layers = sorted({name.rpartition(".")[0] for name in found})
    return {name: (found[f"{name}.control_Q"], found[f"{name}.control_S"]) for name in layers}


@pytest.mark.parametrize("family", SOME)
def test_equals_the_whole_model(tmp_path: Path, family: str) -> None:
    """Loss and every gradient, on two stages, whatever is recomputed."""
    from transformers import AutoModelForCausalLM

    make_folder(tiny_config(family), tmp_path)
    ids, integers = batch_with_classes(packed=family != "gpt2")
    for way, ways in CHECKPOINTING.items():
        stages = stages_of(tmp_path, [0, 2, 4], ways)
        whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).train()
        control = WholeControl(whole, values_of(stages))
        control.classes = integers[2]
        expected, _ = whole_loss_and_gradients(whole, ids, integers[:2])
        gradients = {name: parameter.grad for name, parameter in control.parameters.items()}
        assert all(each is not None and each.abs().max() > 0 for each in gradients.values())
        found, mine = chained_loss_and_gradients(stages, ids, integers)
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-6)
        difference, name = worst_gradient(gradients, mine)  # type: ignore[arg-type]
        assert difference < 2e-6, (way, name, difference)


def test_two_micro_batches_in_flight(tmp_path: Path) -> None:
    """The backward pass of the first comes after the forward pass of the second, as in a pipeline."""
    make_folder(tiny_config("llama"), tmp_path)
    batches = [batch_with_classes(seed=seed) for seed in (1, 2)]
    [stage] = stages_of(tmp_path, [0, 4], {"interval": 1})
    expected = []
    for batch in batches:
        expected.append(chained_loss_and_gradients([stage], *batch)[1])
    stage.zero_grad()
    losses = [stage(batch) for batch in batches]
    for loss in losses:
        loss.backward()
    for name, parameter in stage.model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[0][name] + expected[1][name], atol=1e-6, rtol=1e-6)


def test_nothing_changes_before_the_first_step_and_where_the_class_is_0(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    make_folder(tiny_config("llama"), tmp_path)
    ids, integers = batch_with_classes()
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    expected, _ = whole_loss_and_gradients(whole, ids, integers[:2])
    off = integers.clone()
    off[2] = 0
    stages = stages_of(tmp_path, [0, 2, 4])
    assert torch.equal(chained_loss_and_gradients(stages, ids, off)[0], expected)
    assert not torch.allclose(chained_loss_and_gradients(stages, ids, integers)[0], expected)
    for stage in stages:
        for name, parameter in stage.model.named_parameters():
            if name.endswith("control_S"):
                parameter.data.zero_()
    found, gradients = chained_loss_and_gradients(stages, ids, integers)
    assert torch.equal(found, expected)
    assert {name.rpartition(".")[2] for name in gradients} == {"control_Q", "control_S"}, "the model is frozen"


def test_any_number_of_stages_starts_alike_with_orthonormal_directions(tmp_path: Path) -> None:
    make_folder(tiny_config("llama"), tmp_path)
    drawn = [values_of(stages_of(tmp_path, split, layers=[0, 3])) for split in ([0, 4], [0, 1, 3, 4])]
    assert drawn[0].keys() == drawn[1].keys() == {"model.layers.0", "model.layers.3"}
    for name, (directions, _) in drawn[0].items():
        assert torch.equal(directions, drawn[1][name][0])
        torch.testing.assert_close(directions.T @ directions, torch.eye(RANK), atol=1e-6, rtol=0)
    assert not torch.equal(drawn[0]["model.layers.0"][0], drawn[0]["model.layers.3"][0])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), rank=st.integers(1, 8), size=st.floats(0.01, 1.5))
def test_the_classes_undo_each_other(seed: int, rank: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.empty(16, rank).normal_(generator=generator)).Q
    strengths = torch.empty(rank).uniform_(-size, size, generator=generator)
    added = torch.empty(2, 3, 16).normal_(generator=generator)
    ones = torch.ones(2, 3, dtype=torch.int64)
    there = added + change(added, directions, strengths, ones)
    back = there + change(there, directions, strengths, -ones)
    torch.testing.assert_close(back, added, atol=1e-5, rtol=0)
    assert torch.equal(change(added, directions, strengths, 0 * ones), torch.zeros_like(added))


def test_directions_are_drawn_back_to_orthonormal(tmp_path: Path) -> None:
    """Newton's step squares the distance, about."""
    make_folder(tiny_config("llama"), tmp_path)
    [stage] = stages_of(tmp_path, [0, 4])
    adapters = ControlAdapters(stage.model)
    for name, parameter in stage.model.named_parameters():
        if name.endswith("control_Q"):
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    skews = [float(adapters.skews().max())]
    for _ in range(3):
        adapters.straighten(0.5)
        skews.append(float(adapters.skews().max()))
    assert skews[0] > 0.1
    assert all(after < 2 * before**1.5 for before, after in itertools.pairwise(skews[:3])), skews
    assert skews[-1] < 1e-6


def test_strengths_and_their_decay(tmp_path: Path) -> None:
    make_folder(tiny_config("llama"), tmp_path)
    [stage] = stages_of(tmp_path, [0, 4])
    adapters = ControlAdapters(stage.model)
    before = values_of([stage])
    expected = torch.stack([(torch.exp(before[name][1]) - 1).abs().max() for name in adapters.names])
    torch.testing.assert_close(adapters.strengths(), expected)
    kept = {name: strengths.clone() for name, (_, strengths) in before.items()}
    adapters.decay(3.0, lambda parameter: 0.01)
    for name, (_, strengths) in values_of([stage]).items():
        torch.testing.assert_close(strengths, kept[name] * (1 - 0.03))


def test_hidden_states_of_other_shapes_are_refused(tmp_path: Path) -> None:
    """Some families give their layers several streams."""
    make_folder(tiny_config("llama"), tmp_path)
    [stage] = stages_of(tmp_path, [0, 4])
    ids, integers = batch_with_classes()
    with pytest.raises(UserError, match=r"^--control_adapter_rank: the decoder layers of this model are given hidden"):
        stage((ids, integers[:, :1]))
