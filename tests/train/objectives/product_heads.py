"""A head that is a product, a micro-batch for it, and what a loss makes of them, fused with it or not."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from jllm.data.dataset.shards import IGNORE_INDEX
from jllm.models.pipeline.head import Head, PlainHead
from jllm.train.objectives.cross_entropy import CrossEntropy


class ProductHead(Head):
    """Gains, a product, a factor and a soft cap."""

    def __init__(
        self,
        vocabulary: int,
        width: int,
        *,
        bias: bool = False,
        factor: float = 1.0,
        cap: float | None = None,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        self.gains = nn.Parameter(torch.rand(width, dtype=dtype) + 0.5)
        linear = nn.Linear(width, vocabulary, bias=bias, dtype=dtype)
        with torch.no_grad():
            linear.weight.mul_(3)
        super().__init__(vocabulary, PlainHead(name="", linear=linear, factor=factor, cap=cap))
        self.linear, self.factor, self.cap = linear, factor, cap

    def before(self, hidden: Tensor) -> Tensor:
        return hidden * self.gains

    def __call__(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.before(hidden)) * self.factor
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def parameters(self) -> list[nn.Parameter]:
        return [self.gains, *self.linear.parameters()]


def micro_batch(
    head: ProductHead, tokens: tuple[int, int] = (2, 12), masked: float = 0.3, seed: int = 1
) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*tokens, head.linear.in_features, generator=generator).to(head.linear.weight.dtype)
    labels = torch.randint(0, head.vocabulary, tokens, generator=generator)
    labels[torch.rand(tokens, generator=generator) < masked] = IGNORE_INDEX
    return hidden, {"labels": labels}


def results(
    head: ProductHead,
    hidden: Tensor,
    fields: Mapping[str, Tensor],
    *,
    is_fused: bool,
    kind: str = "cross_entropy",
    gradient: float | None = None,
) -> list[Tensor | None]:
    """The loss, the gradients of the hidden states and of all parameters; their backward pass starts with 0.3."""
    for parameter in head.parameters():
        parameter.grad = None
    given = hidden.clone().requires_grad_()
    loss = CrossEntropy(kind, 1.7, is_fused=is_fused)(given, head, fields, gradient).loss
    (loss * 0.3).backward()  # type: ignore[no-untyped-call]
    return [loss.detach(), given.grad, *(parameter.grad for parameter in head.parameters())]


def assert_equal(found: list[Tensor | None], expected: list[Tensor | None], tolerance: float = 1e-5) -> None:
    """As large as the largest element allows."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert one.dtype == other.dtype
            limit = tolerance * max(1.0, other.abs().max().item())
            torch.testing.assert_close(one, other, atol=limit, rtol=0)


HEADS: list[dict[str, Any]] = [
    {},
    {"bias": True},
    {"factor": 1 / 13},
    {"cap": 3.0},
    {"factor": 0.5, "cap": 2.0, "bias": True},
]
