"""The sum after a product is kept for the backward pass in the product's place; nothing is computed otherwise."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from jllm.models.kept_sums import KeptSums

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def kept(function: Callable[..., Tensor], given: list[Tensor], *, with_pass: bool) -> list[Tensor]:
    """What the compiled function keeps for the backward pass; its gradients are those of the function as it is."""

    def partition(joint: Any, inputs: Any, **more: Any) -> Any:
        if with_pass:
            KeptSums()(joint.graph)
        return min_cut_rematerialization_partition(joint, inputs, compiler="inductor", **more)

    found: list[Tensor] = []
    backend = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph), partition_fn=partition)
    torch._dynamo.reset()
    with torch.autograd.graph.saved_tensors_hooks(lambda each: found.append(each) or each, lambda each: each):
        output = torch.compile(function, backend=backend)(*given)
    gradients = torch.autograd.grad(output.sin().sum(), given)
    expected = torch.autograd.grad(function(*given).sin().sum(), given)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    return [each.detach() for each in found]


def has(found: list[Tensor], value: Tensor) -> bool:
    return any(
        each.numel() == value.numel() and torch.allclose(each.reshape(value.shape), value, rtol=1e-5, atol=1e-6)
        for each in found
    )


def test_the_sum_is_kept() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2)
    config._attn_implementation = "sdpa"
    layer = LlamaDecoderLayer(config, 0)
    x, angles = torch.randn(2, 16, 32, requires_grad=True), torch.randn(2, 16, 8)
    seen: list[Tensor] = []
    hook = layer.post_attention_layernorm.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    of_layer(layer, x, angles)
    hook.remove()

    def run(x: Tensor) -> Tensor:
        return of_layer(layer, x, angles)

    before, after = (kept(run, [x], with_pass=with_pass) for with_pass in (False, True))
    assert has([x.detach() + each.reshape(x.shape) for each in before if each.numel() == x.numel()], seen[0])
    assert not has(before, seen[0]), "the compiler keeps the sum unasked: the pass has nothing to do"
    assert has(after, seen[0])
    assert sum(each.nbytes for each in after) == sum(each.nbytes for each in before)


def of_layer(layer: nn.Module, x: Tensor, angles: Tensor) -> Tensor:
    output: Tensor = layer(x, position_embeddings=(angles.cos(), angles.sin()))
    return output


@pytest.mark.parametrize("rows", [(2, 5), (10,)])
def test_which_sums(rows: tuple[int, ...]) -> None:
    """Those that several operations read, of a product that nothing else reads, itself or as a view."""

    def run(x: Tensor, weight: Tensor) -> Tensor:
        own = x + x @ weight
        again = x @ weight
        beside = own.sin() + again
        return beside.cos() + beside.tanh() + own.cos() + again.exp() + (own.cos() + x @ weight)

    graph = make_fx(run)(torch.randn(*rows, 8), torch.randn(8, 8)).graph
    KeptSums()(graph)
    first, *others = (node for node in graph.nodes if node.target is torch.ops.aten.add.Tensor)
    assert first.meta["recompute"] is CheckpointPolicy.MUST_SAVE
    assert not any("recompute" in node.meta for node in others)
    del first.meta["recompute"]
    first.meta["partitioner_tag"] = "is_backward"
    KeptSums()(graph)
    assert "recompute" not in first.meta


def test_graphs_are_cached_with_the_text_of_the_pass() -> None:
    assert KeptSums().uuid() == KeptSums().uuid() is not None
