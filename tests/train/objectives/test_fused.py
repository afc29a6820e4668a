"""A loss fused with the head's product has the loss and every gradient of one that is not, whatever the chunks."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from jllm.models.pipeline import head as head_module
from jllm.parallel.mesh import Mesh
from jllm.parallel.tensor.group import TensorGroup
from jllm.parallel.tensor.layers import shard_of, vocabulary_parallel_head
from jllm.train.objectives import logit_rows
from jllm.train.objectives.cross_entropy import CrossEntropy, CrossEntropyAndAccuracy
from jllm.train.objectives.objective import ObjectiveInUse
from jllm.train.options.objective import LOSSES
from tests.distributed.ranks import Ranks
from tests.models.chain import chained_loss_and_gradients, load_chain, packed_batch, worst_gradient
from tests.models.family_check import make_folder
from tests.models.tiny import tiny_config
from tests.train.objectives.product_heads import HEADS, ProductHead, assert_equal, micro_batch, results

torch.set_num_threads(1)


@pytest.mark.parametrize("chunk", [1, 5, 12, 100], indirect=True)
@pytest.mark.parametrize("more", HEADS, ids=str)
@pytest.mark.parametrize("kind", LOSSES)
def test_loss_and_gradients(kind: str, more: dict[str, Any], chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logit_rows, "BLOCK_ELEMENTS", 150)
    head = ProductHead(50, 8, **more)
    hidden, fields = micro_batch(head)
    expected = results(head, hidden, fields, is_fused=False, kind=kind)
    assert_equal(results(head, hidden, fields, is_fused=True, kind=kind), expected)
    assert_equal(results(head, hidden, fields, is_fused=True, kind=kind, gradient=0.3), expected)


@settings(deadline=None, max_examples=60)
@given(
    vocabulary=st.integers(1, 70),
    width=st.integers(1, 9),
    tokens=st.tuples(st.integers(1, 3), st.integers(1, 20)),
    chunk=st.integers(1, 70),
    masked=st.sampled_from([0.0, 0.5, 1.0]),
    kind=st.sampled_from(LOSSES),
    more=st.sampled_from(HEADS),
    seed=st.integers(0, 1000),
)
def test_any_shape(
    vocabulary: int,
    width: int,
    tokens: tuple[int, int],
    chunk: int,
    masked: float,
    kind: str,
    more: dict[str, Any],
    seed: int,
) -> None:
    head = ProductHead(vocabulary, width, seed=seed, **more)
    hidden, fields = micro_batch(head, tokens, masked, seed)
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(head_module, "CHUNK_ELEMENTS", chunk * vocabulary)
        found = results(head, hidden, fields, is_fused=True, kind=kind)
    assert_equal(found, results(head, hidden, fields, is_fused=False, kind=kind), 2e-5)
    assert all(each is not None and bool(each.isfinite().all()) for each in found)


@pytest.mark.parametrize("chunk", [5, 24], indirect=True)
def test_nothing_trained_gives_zeros(chunk: int) -> None:
    head = ProductHead(50, 8, bias=True)
    hidden, fields = micro_batch(head, masked=1.1)
    assert all(each is not None and not each.any() for each in results(head, hidden, fields, is_fused=True))


@pytest.mark.parametrize("frozen", [(), ("linear",), ("linear", "gains"), ("linear", "gains", "hidden"), ("hidden",)])
def test_only_wanted_gradients_are_made(frozen: tuple[str, ...]) -> None:
    """As many products as gradients need, and no gradient of what is frozen."""
    found = []
    for is_fused in (False, True):
        head = ProductHead(50, 8, bias=True)
        head.linear.requires_grad_("linear" not in frozen)
        head.gains.requires_grad_("gains" not in frozen)
        hidden, fields = micro_batch(head, masked=0.0)
        hidden.requires_grad_("hidden" not in frozen)
        with Seen() as seen:
            loss = CrossEntropy(is_fused=is_fused)(hidden, head, fields).loss
            assert loss.requires_grad == (len(frozen) < 3)
            if loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
        assert seen.products == 1 + ("linear" not in frozen) + (not {"gains", "hidden"} <= set(frozen))
        found.append([loss.detach(), hidden.grad, *(parameter.grad for parameter in head.parameters())])
    assert_equal(found[1], found[0])


def test_without_gradients_nothing_is_kept() -> None:
    head = ProductHead(50, 8, cap=3.0)
    hidden, fields = micro_batch(head)
    expected = CrossEntropy("focal", 2.0)(hidden, head, fields).loss
    with torch.no_grad(), Seen() as seen:
        loss = CrossEntropy("focal", 2.0, is_fused=True)(hidden, head, fields).loss
    torch.testing.assert_close(loss, expected.detach())
    assert seen.products == 1
    assert not loss.requires_grad


def test_evaluation_without_gradients_has_the_same_loss() -> None:
    head = ProductHead(50, 8, cap=3.0)
    hidden, fields = micro_batch(head)
    evaluation = CrossEntropyAndAccuracy()
    expected = evaluation(hidden, head, fields)
    with torch.no_grad():
        found = evaluation(hidden, head, fields)
    torch.testing.assert_close(found.loss, expected.loss.detach())
    assert found.reported.keys() == expected.reported.keys()
    assert all(torch.equal(found.reported[name], expected.reported[name]) for name in found.reported)


class Seen(TorchDispatchMode):
    """How many products of two matrices were made, and how many elements the largest tensor had."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        for each in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(each, Tensor):
                self.elements = max(self.elements, each.numel())
        return result


@pytest.mark.parametrize("chunk", [2], indirect=True)
def test_memory_does_not_grow_with_the_logits(chunk: int) -> None:
    """No tensor is larger than a chunk's logits, a weight, or the hidden states; three products a chunk."""
    head = ProductHead(50, 2)
    for length in (8, 40):
        hidden, fields = micro_batch(head, (1, length), masked=0.0)
        with Seen() as seen:
            results(head, hidden, fields, is_fused=True)
        assert seen.elements == 2 * chunk * 50  # twice as many, for the weight is trained
        assert seen.products == 3 * (length // (2 * chunk))


def test_gradients_that_were_announced_must_come() -> None:
    head = ProductHead(50, 8)
    hidden, fields = micro_batch(head)
    with pytest.raises(RuntimeError, match="not the one that was announced"):
        results(head, hidden, fields, is_fused=True, gradient=0.31)
    in_use = ObjectiveInUse(CrossEntropy())
    for scale, gradient in ((1.0, None), (7.0, None), (7.0, 0.125)):
        found = []
        for is_fused in (False, True):
            in_use.use(CrossEntropy(is_fused=is_fused), scale=scale, gradient=gradient)
            given = hidden.clone().requires_grad_()
            (in_use(given, head, fields) / 8).backward()  # type: ignore[no-untyped-call]
            found.append(given.grad)
        assert_equal(found[1:], found[:1])


def test_gradients_are_handed_out_once() -> None:
    head = ProductHead(50, 8)
    hidden, fields = micro_batch(head)
    loss = CrossEntropy(is_fused=True)(hidden, head, fields).loss
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match="handed out once"):
        loss.backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("gradient", [None, 0.3])
@pytest.mark.parametrize("chunk", [16, 64, 1024], indirect=True)
def test_bf16_is_as_exact_as_without(chunk: int, gradient: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors against fp64, by norm: at most a tenth above those of the loss that is not fused."""
    monkeypatch.setattr(head_module, "CHUNK_ELEMENTS", chunk * 512)
    head = ProductHead(512, 64, dtype=torch.bfloat16)
    hidden, fields = micro_batch(head, (1, 1024), masked=0.2)
    exact_head = ProductHead(512, 64, dtype=torch.float64)
    for exact, parameter in zip(exact_head.parameters(), head.parameters(), strict=True):
        exact.data = parameter.data.double()
    exact_results = results(exact_head, hidden.double(), fields, is_fused=False)

    def errors(is_fused: bool) -> list[float]:
        found = results(head, hidden, fields, is_fused=is_fused, gradient=gradient)
        return [
            float((one.double() - other).norm() / other.norm())
            for one, other in zip(found, exact_results, strict=True)
            if one is not None and other is not None
        ]

    plain, together = errors(False), errors(True)
    # The factor of the gradient is rounded with the gradients where it was not announced.
    allowed = 1.1 if gradient is not None or chunk < 1024 else 1.4
    assert together[0] < 1e-3
    assert all(one <= allowed * other for one, other in zip(together[1:], plain[1:], strict=True)), (plain, together)


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "granite", "gpt2", "bert"])
def test_families(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one stage, where a tied head is the embedding, and on the last of two; uneven chunks."""
    more = {"granite": {"logits_scaling": 13.0}, "cohere": {"logit_scale": 0.7}}
    config = tiny_config(family, **more.get(family, {}))
    make_folder(config, tmp_path)
    monkeypatch.setattr(head_module, "CHUNK_ELEMENTS", 96 * 7)
    batch = packed_batch(96, packed=False)
    for boundaries in ([0, 4], [0, 2, 4]):
        found = []
        for is_fused in (False, True):
            stages = load_chain(tmp_path, boundaries, objective=ObjectiveInUse(CrossEntropy(is_fused=is_fused)))
            found.append(chained_loss_and_gradients(stages, *batch))
        (loss, gradients), (together, differing) = found
        torch.testing.assert_close(together, loss, rtol=1e-6, atol=0)
        assert worst_gradient(gradients, differing)[0] < 1e-5


def of_parts() -> list[list[Any]]:
    """Of every head: the loss and the gradients with this rank's part of it, and this part."""
    dist.init_process_group("gloo")
    group = TensorGroup.make(Mesh(tensor=2), dist.get_rank())
    head_module.CHUNK_ELEMENTS = 5 * 26
    logit_rows.BLOCK_ELEMENTS = 3 * 26  # the larger part has 26
    answers = []
    for more in HEADS:
        for kind in LOSSES:
            head = ProductHead(51, 8, **more)
            hidden, fields = micro_batch(head)
            vocabulary_parallel_head(head.linear, group)
            head.shard = shard_of(head.linear)
            found = results(head, hidden, fields, is_fused=True, kind=kind)
            answers.append([each.numpy() if each is not None else None for each in found])
    return answers


def test_parts_of_the_vocabulary() -> None:
    """Two ranks, whose parts are not of one size, have the loss and the gradients of one that has all of it."""
    answers = Ranks(2).run(of_parts)
    for number, (more, kind) in enumerate(itertools.product(HEADS, LOSSES)):
        head = ProductHead(51, 8, **more)
        hidden, fields = micro_batch(head)
        expected = results(head, hidden, fields, is_fused=True, kind=kind)
        first, second = ([torch.from_numpy(each) for each in answer[number]] for answer in answers)
        for one in (first, second):  # the loss, and the gradients of hidden states and of what comes before the product
            assert_equal([*one[:3]], expected[:3])
        parts = [torch.cat(pair) for pair in zip(first[3:], second[3:], strict=True)]
        assert_equal([*parts], expected[3:])
