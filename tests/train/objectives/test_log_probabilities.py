"""Log-probabilities of trained tokens are those of all logits at once, whatever the chunks; sums are the same in any
order."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import log_softmax
from torch.utils._python_dispatch import TorchDispatchMode

from jllm.models.pipeline.head import Head
from jllm.train.objectives import logit_rows
from jllm.train.objectives.log_probabilities import document_sums
from tests.train.objectives.heads import LinearHead
from tests.train.objectives.product_heads import HEADS, ProductHead

torch.set_num_threads(1)
DOCUMENTS = torch.tensor([[0] * 5 + [1] * 7, [2] * 4 + [3] * 8])


def given(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(2, 12, 8, generator=generator, dtype=dtype)
    labels = torch.randint(0, 50, (2, 12), generator=generator)
    labels[:, :2] = labels[1, 4:9] = -100
    return hidden, labels


def plain(hidden: Tensor, head: Head, labels: Tensor) -> Tensor:
    logps = log_softmax(head(hidden).float(), -1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    logps = torch.where(labels >= 0, logps, 0.0)
    return torch.stack([logps[number == DOCUMENTS].sum() for number in range(4)])


def sums_and_gradients(head: Any, *, is_fused: bool | None, module: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    hidden, labels = given()
    hidden.requires_grad_()
    for parameter in module.parameters():
        parameter.grad = None
    weights = torch.tensor([0.3, -1.0, 2.0, 0.7])
    if is_fused is None:
        found = plain(hidden, head, labels)
    else:
        found = document_sums(hidden, head, labels, DOCUMENTS, is_fused=is_fused).logps[:4]
    (found * weights).sum().backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    return found.detach(), hidden.grad, [each.grad.clone() for each in module.parameters() if each.grad is not None]


@pytest.mark.parametrize("chunk", [1, 5, 100], indirect=True)
@pytest.mark.parametrize("more", HEADS, ids=str)
@pytest.mark.parametrize("is_fused", [False, True])
def test_sums_and_gradients(is_fused: bool, more: dict[str, Any], chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logit_rows, "BLOCK_ELEMENTS", 150)
    head = ProductHead(50, 8, **more)
    expected = sums_and_gradients(head, is_fused=None, module=head)
    found = sums_and_gradients(head, is_fused=is_fused, module=head)
    torch.testing.assert_close(found[0].float(), expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1], expected[1], atol=1e-5, rtol=1e-5)
    for one, other in zip(found[2], expected[2], strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk", [3], indirect=True)
def test_a_head_of_any_kind(chunk: int) -> None:
    head = LinearHead(torch.float32)
    expected = sums_and_gradients(head, is_fused=None, module=head.module)
    found = sums_and_gradients(head, is_fused=True, module=head.module)
    torch.testing.assert_close(found[0].float(), expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1], expected[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("is_fused", [False, True])
def test_nothing_is_trained_on(is_fused: bool) -> None:
    """Then sums and counts are 0, and everything has a gradient of 0."""
    head = ProductHead(50, 8)
    hidden, labels = given()
    hidden.requires_grad_()
    found = document_sums(hidden, head, torch.full_like(labels, -100), DOCUMENTS, is_fused=is_fused)
    found.logps.sum().backward()  # type: ignore[no-untyped-call]
    assert not found.logps.any()
    assert not found.counts.any()
    assert hidden.grad is not None
    assert not hidden.grad.any()


class Shapes(TorchDispatchMode):
    """The most elements that a tensor of floats had."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple | list) else (made,):
            if isinstance(each, Tensor) and each.is_floating_point():
                self.most = max(self.most, each.numel())
        return made


@pytest.mark.parametrize("chunk", [4], indirect=True)
@pytest.mark.parametrize("is_fused", [False, True])
def test_there_are_never_more_logits_than_a_chunk(is_fused: bool, chunk: int) -> None:
    head = ProductHead(50, 8)
    hidden, labels = given()
    hidden.requires_grad_()
    with Shapes() as shapes:
        document_sums(hidden, head, labels, DOCUMENTS, is_fused=is_fused).logps.sum().backward()  # type: ignore[no-untyped-call]
    assert shapes.most <= max(chunk * 50, 8 * 50)


def test_sums_are_the_same_in_any_order() -> None:
    from jllm.train.objectives.log_probabilities import _ExactSums

    generator = torch.Generator().manual_seed(1)
    values, numbers = -10 * torch.rand(5000, generator=generator), torch.randint(0, 7, (5000,), generator=generator)
    order = torch.randperm(5000, generator=generator)
    first = _ExactSums.apply(values, numbers, 8, None)  # type: ignore[no-untyped-call]
    again = _ExactSums.apply(values[order], numbers[order], 8, None)  # type: ignore[no-untyped-call]
    assert torch.equal(first, again)
    exact = torch.zeros(8, dtype=torch.float64).index_add_(0, numbers, values.double())
    torch.testing.assert_close(first, exact, atol=1e-6, rtol=0)
    values[3] = torch.inf
    spoilt = _ExactSums.apply(values, numbers, 8, None)  # type: ignore[no-untyped-call]
    assert torch.equal(spoilt.isnan(), torch.arange(8) == numbers[3])
