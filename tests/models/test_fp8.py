"""Linear maps in fp8: near bf16's loss and gradients, the same parameters, in any number of stages, compiled or not."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jllm.models.activation_checkpointing import checkpoint_activations
from jllm.models.compiled import Shape, compile_layers
from jllm.models.fp8 import LinearMaps, count_maps, use_fp8
from jllm.models.pipeline.stage import PipelineStage
from jllm.train.options.speed import FP8_RECIPES
from tests.models.chain import chained_loss_and_gradients, load_chain, packed_batch
from tests.models.family_check import make_folder
from tests.models.tiny import tiny_config

pytest.importorskip("torchao", reason="torchao is not installed: pip install .[fp8]")
torch.set_num_threads(1)
SIZE = float(os.environ.get("JLLM_TEST_SIZE", "1"))
SIZES = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96, "initializer_range": 0.05}
"""All maps are multiples of 16."""
NEAR = 0.3
"""The largest difference of a gradient from bf16's, relative to its norm: fp8 keeps 3 bits of a number, or 2.
Those of bf16 differ from fp32's by up to 0.03 here."""
NEAR_LOSS = 0.005


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fp8")
    make_folder(tiny_config("llama", **SIZES), folder)
    return folder


def chain(
    folder: Path, boundaries: list[int], recipe: str | None = None, *, in_halves: bool = False
) -> list[PipelineStage]:
    stages = load_chain(folder, boundaries, dtype=torch.bfloat16, in_halves=in_halves)
    for stage in stages if recipe is not None else ():
        use_fp8(stage.model, stage.span, str(recipe), is_emulated=True)
        stage.train()
    return stages


def distances(expected: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, float]:
    assert expected.keys() == found.keys()
    return {
        name: float((found[name].float() - each.float()).norm() / each.float().norm())
        for name, each in expected.items()
    }


@pytest.mark.parametrize("recipe", FP8_RECIPES)
def test_near_bf16(folder: Path, recipe: str) -> None:
    """Also rows whose tokens are no multiple of 16. The gradients are other ones, or nothing was in fp8."""
    for rows, length in ((2, 24), (1, 23)):
        inputs = packed_batch(96, batch=rows, length=length, packed=False)
        loss, gradients = chained_loss_and_gradients(chain(folder, [0, 4]), *inputs)
        found = chained_loss_and_gradients(chain(folder, [0, 4], recipe), *inputs)
        assert abs(float(found[0] - loss)) < NEAR_LOSS * float(loss)
        far = distances(gradients, found[1])
        assert max(far.values()) < NEAR
        assert min(far.values()) > 0.02
        assert all(each.dtype == torch.bfloat16 for each in found[1].values())


def test_products_are_those_of_what_fp8_leaves(folder: Path) -> None:
    [stage] = chain(folder, [0, 4], "tensorwise")
    layer = stage.model.get_submodule("model.layers.1.mlp.up_proj")
    assert isinstance(layer, nn.Linear)
    inputs = torch.randn(3, 5, 64).bfloat16()

    def rounded(tensor: Tensor) -> Tensor:
        scale = 448 / tensor.float().abs().max()
        return (tensor.float() * scale).to(torch.float8_e4m3fn).float() / scale

    expected = rounded(inputs) @ rounded(layer.weight.detach()).T
    torch.testing.assert_close(layer(inputs).float(), expected.bfloat16().float(), atol=0.02, rtol=0.01)
    assert (layer(inputs).float() - inputs.float() @ layer.weight.float().T).abs().max() > 0.02


@pytest.mark.parametrize("recipe", FP8_RECIPES)
def test_stages_are_the_whole_model(folder: Path, recipe: str) -> None:
    inputs = packed_batch(96)
    loss, gradients = chained_loss_and_gradients(chain(folder, [0, 4], recipe), *inputs)
    for cut in (chain(folder, [0, 1, 4], recipe), chain(folder, [0, 3, 8], recipe, in_halves=True)):
        found = chained_loss_and_gradients(cut, *inputs)
        assert torch.equal(found[0], loss)
        assert all(torch.equal(found[1][name], each) for name, each in gradients.items())


def test_parameters_stay_what_they_are(folder: Path) -> None:
    stages = load_chain(folder, [0, 2, 4], dtype=torch.bfloat16)
    for stage in stages:
        parameters, state = dict(stage.model.named_parameters()), stage.model.state_dict()
        use_fp8(stage.model, stage.span, "tensorwise", is_emulated=True)
        after = dict(stage.model.named_parameters())
        assert [*after] == [*parameters]
        assert all(after[name] is each for name, each in parameters.items())
        assert [*stage.model.state_dict()] == [*state]
        assert count_maps(stage.model, stage.span) == LinearMaps(total=14, in_fp8=14)


@pytest.mark.parametrize("ways", [{"interval": 2}, {"attention_only": True}, {"interval": 1, "offload": True}])
def test_recomputed(folder: Path, ways: dict[str, Any]) -> None:
    inputs = packed_batch(96)
    loss, gradients = chained_loss_and_gradients(chain(folder, [0, 4], "rowwise"), *inputs)
    stages = chain(folder, [0, 4], "rowwise")
    checkpoint_activations(stages[0].model, stages[0].span, **ways)
    found = chained_loss_and_gradients(stages, *inputs)
    assert torch.equal(found[0], loss)
    assert all(torch.equal(found[1][name], each) for name, each in gradients.items())


@pytest.mark.parametrize("recipe", FP8_RECIPES if SIZE > 1 else FP8_RECIPES[:1])
def test_compiled(folder: Path, recipe: str) -> None:
    """Other shapes too; recomputed, as a run may have it."""
    [stage] = chain(folder, [0, 4], recipe)
    batches = [packed_batch(96), packed_batch(96, batch=3, length=21)]
    expected = [chained_loss_and_gradients([stage], *each) for each in batches]
    options: Any = {"usual": Shape(2, 24), "backend": "aot_eager", "warn": pytest.fail, "tell": str}
    state = compile_layers(stage.model, stage.span, **options)
    checkpoint_activations(stage.model, stage.span, interval=1, is_compiled=True)
    for inputs, (loss, gradients) in zip(batches, expected, strict=True):
        found = chained_loss_and_gradients([stage], *inputs)
        assert abs(float(found[0] - loss)) < NEAR_LOSS * float(loss)
        assert max(distances(gradients, found[1]).values()) < NEAR
    assert not state.failed
    assert len(state.kinds) == 2


def test_what_does_not_fit_stays(tmp_path: Path) -> None:
    """Routers, and sizes that are no multiples of 16: here the keys' and values'."""
    sizes = {**SIZES, "head_dim": 8, "num_key_value_heads": 1}
    make_folder(tiny_config("mixtral", **sizes), tmp_path)
    [stage] = chain(tmp_path, [0, 4], "tensorwise")
    assert count_maps(stage.model, stage.span) == LinearMaps(total=16, in_fp8=8)
    kinds = {
        name.split(".", 3)[3]: type(module)
        for name, module in stage.model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }
    assert kinds["self_attn.k_proj"] is kinds["self_attn.v_proj"] is nn.Linear
    assert kinds["self_attn.q_proj"] is kinds["self_attn.o_proj"] is not nn.Linear
    assert type(stage.model.get_submodule("lm_head")) is nn.Linear


def test_a_family_whose_router_is_a_linear_map(tmp_path: Path) -> None:
    make_folder(tiny_config("jetmoe", **SIZES, num_local_experts=16), tmp_path)
    [stage] = chain(tmp_path, [0, 4], "tensorwise")
    routing = [each for name, each in stage.model.named_modules() if "router" in name and isinstance(each, nn.Linear)]
    assert routing
    assert all(type(each) is nn.Linear for each in routing)


GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)


@pytest.mark.skipif(not GPU, reason="needs a GPU of compute capability 8.9 or more")
@pytest.mark.parametrize("recipe", FP8_RECIPES)
@pytest.mark.parametrize("is_compiled", [False, True])
def test_on_a_gpu(tmp_path: Path, recipe: str, is_compiled: bool) -> None:
    """The kernels' products are near the emulated ones, for any number of tokens."""
    make_folder(tiny_config("llama", **SIZES), tmp_path)
    inputs = [packed_batch(96), packed_batch(96, batch=1, length=21, packed=False)]
    found = []
    for is_emulated in (True, False):
        [stage] = load_chain(tmp_path, [0, 4], dtype=torch.bfloat16, device="cuda")
        use_fp8(stage.model, stage.span, recipe, is_emulated=is_emulated)
        stage.train()
        if is_compiled and not is_emulated:
            compile_layers(stage.model, stage.span, usual=Shape(2, 24), warn=pytest.fail, tell=str)
        found.append([chained_loss_and_gradients([stage], *(part.cuda() for part in each)) for each in inputs])
    for (loss, gradients), (own_loss, own) in zip(*found, strict=True):
        assert abs(float(own_loss - loss)) < NEAR_LOSS * float(loss)
        assert max(distances(gradients, own).values()) < NEAR
