"""Layers cut inside: each parameter in one half, the same numbers, and nothing that was not shown."""

import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from jllm.errors import UserError
from jllm.models.compiled import Shape, compile_layers
from jllm.models.families import NAMED, catalogue, shown_halves
from jllm.models.pipeline.carving import published_names, structure_of
from jllm.models.pipeline.costs import estimate_costs
from jllm.models.pipeline.halves import LayerHalves, LayerPart, find_halves
from jllm.models.pipeline.stand_ins import AbsentPart
from jllm.models.weights.source import bare_model, causal_class
from tests.models.chain import chained_loss_and_gradients, load_chain, packed_batch, worst_gradient
from tests.models.compiled_check import TRACED
from tests.models.family_check import load_whole, make_folder
from tests.models.half_check import believed, find_cuts, how_halved, show_cuts
from tests.models.moved import DiffersError, move_weights
from tests.models.tiny import tiny_config

torch.set_num_threads(1)
IN_FULL = float(os.environ.get("JLLM_TEST_SIZE", "1")) > 1
HALVED = [family.model_type for family in catalogue()[1] if family.model_type in NAMED and family.halves]
EVERYWHERE = [0, 1, 3, 5, 7, 8]


def model_in(folder: Path, family: str, *, tied: bool) -> Path:
    make_folder(tiny_config(family, tied=tied), folder / "whole")
    return folder / "whole"


def test_text_and_back() -> None:
    halves = LayerHalves(
        kind="SomeLayer is_odd=True",
        first=(LayerPart("norm", "Norm"), LayerPart("attn", "Attention", 2)),
        second=(LayerPart("mlp", "MLP"),),
    )
    assert str(halves) == "SomeLayer is_odd=True: norm=Norm attn=Attention/2 | mlp=MLP"
    assert LayerHalves.parse(str(halves)) == halves
    for family in catalogue()[1]:
        assert all(str(LayerHalves.parse(text)) == text for text in family.halves)
        assert not (family.halves and family.not_halved)


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("gemma2", False), ("deepseek_v3", False)])
def test_each_parameter_is_in_one_half(tmp_path: Path, family: str, tied: bool) -> None:
    """And is counted where it is."""
    folder = model_in(tmp_path, family, tied=tied)
    costs = estimate_costs(tiny_config(family, tied=tied), in_halves=True)
    for boundaries in (EVERYWHERE, [0, 3, 8], [0, 2, 3, 8]):
        stages = load_chain(folder, boundaries, in_halves=True)
        structure = structure_of(stages[0].model)
        names = [name for stage in stages for name in published_names(stage.model, stage.span).values()]
        assert set(names) == set(structure.parameters)
        assert {name for name in names if names.count(name) > 1} == {original for _, original in structure.tied}
        for stage, (first, end) in zip(stages, itertools.pairwise(boundaries), strict=True):
            own = sum(parameter.numel() for parameter in stage.model.parameters())
            assert costs.parameters(first, end).total == own
    assert costs.of_layers().layers == estimate_costs(tiny_config(family, tied=tied)).layers


def test_the_sum_of_halves_is_the_layer() -> None:
    """Of time and memory, with recomputation or without."""
    config = tiny_config("mixtral")
    ways: tuple[dict[str, Any], ...] = (
        {},
        {"checkpoint_interval": 2},
        {"checkpoint_interval": 1, "checkpoint_offload": True},
    )
    for more in ways:
        whole, halves = (estimate_costs(config, in_halves=cut, **more) for cut in (False, True))
        assert halves.time(0, 8) == pytest.approx(whole.time(0, 4))
        assert halves.time(2, 6) == pytest.approx(whole.time(1, 3))
        assert halves.memory(2, 8, in_flight=3) == pytest.approx(whole.memory(1, 4, in_flight=3))
        assert halves.operations == pytest.approx(whole.operations)


@pytest.mark.parametrize("family", HALVED if IN_FULL else ["gemma2", "qwen2_moe"])
def test_shown(tmp_path: Path, family: str) -> None:
    """As the walk does: with weights that hide nothing, cut inside every layer."""
    folder = model_in(tmp_path, family, tied=False)
    known = {each.model_type: each for each in catalogue()[1]}[family]
    assert how_halved(folder, tiny_config(family, tied=False)) == (known.halves, "")
    if family == "qwen2_moe":
        assert len(known.halves) == 2, "with experts and without"


def test_what_is_shown_can_fail(tmp_path: Path) -> None:
    """A norm in the wrong half; layers without a place for a cut."""
    config = tiny_config("llama")
    folder = model_in(tmp_path, "llama", tied=False)
    whole = move_weights(load_whole(folder), tmp_path / "moved")
    [right] = find_cuts(whole)
    wrong = LayerHalves.parse(right)
    wrong = LayerHalves(kind=wrong.kind, first=(*wrong.first, wrong.second[0]), second=wrong.second[1:])
    with believed("llama", (str(wrong),)), pytest.raises(DiffersError, match="differs by"):
        show_cuts(whole, tmp_path / "moved", config)
    halves, why = how_halved(model_in(tmp_path / "other", "cohere", tied=False), tiny_config("cohere"))
    assert (halves, why) == ((), "self_attn and mlp work on the same input")


def test_what_was_not_shown_is_refused() -> None:
    """A family, a kind of layer that the family has elsewhere, a switch of it, code that is not transformers' own."""
    for config, says in (
        (tiny_config("cohere"), "model type 'cohere' cannot be cut inside: self_attn and mlp work on"),
        (tiny_config("stablelm", use_parallel_residual=True), "StableLmDecoderLayer use_parallel_residual=True"),
    ):
        with pytest.raises(UserError, match=says) as caught:
            estimate_costs(config, in_halves=True)
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith("--split_dlayer: ")
    family = causal_class(tiny_config("llama"))
    layer = bare_model(tiny_config("llama"), family, dtype=torch.float32).model.layers[0]
    assert find_halves(layer, family).first[1].name == "self_attn"
    layer.is_parallel = True
    with pytest.raises(UserError, match="LlamaDecoderLayer is_parallel=True"):
        find_halves(layer, family)
    foreign = type(family.__name__, (family,), {"__module__": "somewhere"})
    with pytest.raises(UserError, match="not shown to compute the same"):
        find_halves(layer, foreign)
    assert shown_halves(family)[0]


def test_part_answers_for_the_replaced_one() -> None:
    class Attention(nn.Module):
        is_causal = True

        def __init__(self) -> None:
            super().__init__()
            self.layer_idx = 3

    attention = Attention()
    part = AbsentPart(attention, 2)
    hidden = torch.rand(2, 3, 8)
    for output in (part(hidden), part(attention_mask=torch.ones(1), hidden_states=hidden)):
        zeros, nothing = output
        assert (zeros.shape, bool(zeros.any()), nothing) == (hidden.shape, False, None)
    assert AbsentPart(attention, 0)(hidden).shape == hidden.shape
    assert part.layer_idx == 3
    assert part.is_causal


def test_compiled_halves(tmp_path: Path) -> None:
    """Layers whole and cut run the same code, and each of them its own graph."""
    make_folder(tiny_config("llama", num_hidden_layers=2), tmp_path)
    stages = load_chain(tmp_path, [0, 1, 4], in_halves=True)
    batch = packed_batch(96)
    loss, gradients = chained_loss_and_gradients(stages, *batch)
    lines: list[str] = []
    torch._dynamo.reset()
    for stage in stages:
        compile_layers(stage.model, stage.span, usual=Shape(2, 24), warn=lines.append, tell=str, backend=TRACED)
    found, differing = chained_loss_and_gradients(stages, *batch)
    torch.testing.assert_close(found, loss, atol=1e-5, rtol=0)
    assert worst_gradient(gradients, differing)[0] <= 1e-5
    assert not lines
