"""A small head, a micro-batch for it, and the plain loss of it; objectives are compared with that."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from jllm.data.dataset.shards import IGNORE_INDEX
from jllm.models.pipeline import head as head_module
from jllm.models.pipeline.head import Head
from jllm.train.objectives.objective import Objective

BATCH, LENGTH, WIDTH, VOCABULARY = 2, 12, 8, 50


class LinearHead(Head):
    """A norm, a projection and a soft cap."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(VOCABULARY)
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY), nn.Tanh()).to(dtype)

    def __call__(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.module(hidden)
        return logits


def micro_batch(dtype: torch.dtype) -> tuple[Tensor, Mapping[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(BATCH, LENGTH, WIDTH, generator=generator, dtype=dtype).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=generator)
    labels[0, 3:7] = labels[1, -1] = IGNORE_INDEX
    return hidden, {"labels": labels}


@contextmanager
def chunks_of(tokens: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as changed:
        changed.setattr(head_module, "CHUNK_ELEMENTS", tokens * VOCABULARY)
        yield


def plain(hidden: Tensor, head: Head, fields: Mapping[str, Tensor]) -> Tensor:
    """The loss as one would write it down."""
    logits = head(hidden)
    return cross_entropy(
        logits.float().view(-1, VOCABULARY), fields["labels"].reshape(-1), ignore_index=IGNORE_INDEX, reduction="sum"
    )


def loss_and_gradients(compute: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The loss, and the gradients of the hidden states and of all that the head has."""
    head = LinearHead(dtype)
    hidden, fields = micro_batch(dtype)
    loss = compute(hidden, head, fields)
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = [tensor.grad for tensor in (hidden, *head.module.parameters())]
    return [loss.detach(), *(gradient for gradient in gradients if gradient is not None)]


def summed(objective: Objective) -> Callable[..., Tensor]:
    return lambda *arguments: objective(*arguments).loss
