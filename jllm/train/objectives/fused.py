"""The product of a plain head and the loss in one: gradients are made with the logits, a chunk of tokens at a time.

Each chunk's logits are written once, by one product in the compute type, and overwritten by their own gradient, of
which two more products make the gradients of the hidden states and of the weight. So the backward pass does nothing,
and what it would need is never kept: neither logits nor anything of their size in fp32.

The logits of all chunks take turns in one buffer of 256 MiB at most, or of 512 where the weight is trained
(`tokens_of_a_chunk`): each chunk's share of the weight's gradient has to read and write all of it, so smaller chunks
are slower (`benchmarks/fused_loss.py`).
From them to losses and gradients everything is in fp32 (`jllm.train.objectives.logit_rows`). The gradient of the weight
is summed over chunks in the type of the weight: each sum is rounded once, where autograd rounds each chunk's share too.

What follows the loss multiplies its gradient. Where that factor is known beforehand it is worked in before anything is
rounded, and the backward pass checks on the device, without waiting, that it was true; else the finished gradients are
multiplied in fp32.

Guarantees: the losses and gradients of `summed_loss`, up to rounding; no wait for the device.
Costs: three products; the logits of a chunk; the gradients, from the forward pass on. On CPU tokens that are not
trained on are left out first; elsewhere that would make the host wait.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from jllm.data.dataset.shards import IGNORE_INDEX
from jllm.models.pipeline.head import Head, tokens_of_a_chunk
from jllm.parallel.tensor.layers import VocabularyParallelLinear
from jllm.parallel.tensor.vocabulary import VocabularyShard
from jllm.train.objectives.logit_rows import RowLoss, losses_of

ALIGNED = 64
"""Rows of logits start at multiples of so many elements, and chunks have multiples of so many tokens, where they can:
products of other shapes are several times slower on GPUs."""
_SCALED_AT_ONCE = 2**24
"""Elements that are multiplied in fp32 at a time."""


def fused_loss(
    hidden: Tensor, head: Head, labels: Tensor, kind: str, gamma: float, expected: float | None = None
) -> Tensor:
    """The sum over trained tokens, a scalar in fp32, as `summed_loss` has it.

    Args:
        hidden: [B, S, width].
        head: a plain one.
        labels: [B, S].
        kind, gamma: the loss of a token.
        expected: the gradient of the result, where it is known; any other one is then an error.
    """
    plain = head.plain
    assert plain is not None
    tokens, targets = hidden.flatten(0, -2), labels.flatten()
    if tokens.device.type == "cpu":
        trained = (targets != IGNORE_INDEX).nonzero()[:, 0]
        if len(trained) < len(targets):
            # One stays, so that everything has its gradient.
            trained = trained if len(trained) else trained.new_zeros(1)
            tokens, targets = tokens.index_select(0, trained), targets.index_select(0, trained)
    rows = RowLoss(kind=kind, gamma=gamma, factor=plain.factor, cap=plain.cap)
    reached = head.before(tokens)
    if isinstance(plain.linear, VocabularyParallelLinear) and plain.linear.copies is not None:
        reached = plain.linear.copies(reached)
    inputs = reached, plain.linear.weight, plain.linear.bias
    wanted = [torch.is_grad_enabled() and each is not None and each.requires_grad for each in inputs]
    call = _FusedCall(rows=rows, wanted=tuple(wanted), expected=expected, shard=head.shard)
    loss: Tensor = _FusedLoss.apply(*inputs, targets, call)  # type: ignore[no-untyped-call]
    return loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class _FusedCall:
    """What is no tensor.

    Attributes:
        rows: logits to losses.
        wanted: whether hidden states, weight and bias want gradients.
        expected: as in `fused_loss`.
        shard: which part of the vocabulary the weight is of.
    """

    rows: RowLoss
    wanted: tuple[bool, ...]
    expected: float | None
    shard: VocabularyShard | None


class _FusedLoss(torch.autograd.Function):
    """Hidden states [N, width], weight [V, width], bias [V] or None, labels [N] → the summed loss."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, call: _FusedCall
    ) -> Tensor:
        """The sum, and all gradients."""
        of_hidden, of_weight, of_bias = (
            torch.empty_like(each) if each is not None and wanted else None
            for each, wanted in zip((hidden, weight, bias), call.wanted, strict=True)
        )
        chunks = LogitChunks(len(hidden), weight, is_trained=of_weight is not None, shard=call.shard)
        # In fp32: it is small, and a sum over many rows.
        of_bias = of_bias.float().zero_() if of_bias is not None else None
        factor = torch.full((), 1.0 if call.expected is None else call.expected, device=hidden.device)
        losses = []
        for place in range(0, len(hidden), chunks.size):
            tokens = hidden[place : place + chunks.size]
            logits = chunks.multiply(tokens, weight, bias)
            targets = labels[place : place + chunks.size]
            losses.append(chunks.losses(call.rows, targets, factor, has_gradient=any(call.wanted)))
            if of_hidden is not None:
                torch.mm(logits, weight, out=of_hidden[place : place + chunks.size])
            add_shares(logits, tokens, of_weight, of_bias, is_first=place == 0)
        ctx.expected = call.expected
        ctx.gradients = of_hidden, of_weight, of_bias.to(weight.dtype) if of_bias is not None else None
        return torch.cat(losses).sum()

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """What the forward pass made."""
        if ctx.gradients is None:
            raise RuntimeError("the gradients of a fused loss are handed out once")
        gradients, ctx.gradients = ctx.gradients, None
        if ctx.expected is None:
            for each in gradients:
                _scale(each, gradient)
        else:
            # A factor that an engine makes by several divisions may differ in its last digits.
            is_near = (gradient - ctx.expected).abs() <= 1e-5 * abs(ctx.expected)
            torch._assert_async(is_near, "the gradient of the loss is not the one that was announced")
        return (*gradients, None, None)


def add_shares(
    logits: Tensor, tokens: Tensor, of_weight: Tensor | None, of_bias: Tensor | None, *, is_first: bool
) -> None:
    """Add what a chunk, whose logits [N, V] became their gradient, gives to the gradients of weight and bias.

    Args:
        logits, tokens: of the chunk; tokens are hidden states [N, width].
        of_weight: [V, width], empty before the first chunk; None where it is not wanted.
        of_bias: [V] in fp32; likewise, but 0 before.
        is_first: whether it is the first chunk.
    """
    if of_weight is not None and is_first:
        torch.mm(logits.t(), tokens, out=of_weight)
    elif of_weight is not None:
        of_weight.addmm_(logits.t(), tokens)
    if of_bias is not None:
        of_bias += logits.sum(0, dtype=torch.float32)


class LogitChunks:
    """The buffer in which the logits of chunks take turns.

    Args:
        tokens: that there are.
        weight: of the head, [V, width].
        is_trained: whether chunks add to the gradient of the weight.
        shard: which part of the vocabulary the weight is of, where other ranks have others.

    Attributes:
        size: tokens of a chunk, but of the last one.
    """

    def __init__(self, tokens: int, weight: Tensor, *, is_trained: bool, shard: VocabularyShard | None = None) -> None:
        vocabulary = len(weight)
        # Ranks that share the vocabulary take the same tokens at a time.
        widest, itemsize = vocabulary if shard is None else shard.largest, weight.dtype.itemsize
        self.size = tokens_of_a_chunk(widest, itemsize=itemsize, is_trained=is_trained)
        self._shard = shard
        width = vocabulary
        if weight.device.type != "cpu":
            self.size = max(self.size // ALIGNED * ALIGNED, 1)
            width = -(-vocabulary // ALIGNED) * ALIGNED
        rows = min(self.size, tokens)
        self._logits = torch.empty(rows, width, dtype=weight.dtype, device=weight.device)[:, :vocabulary]

    def multiply(self, tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The products of these tokens, [n, V], until the next ones."""
        logits = self._logits[: len(tokens)]
        if bias is None:
            torch.mm(tokens, weight.t(), out=logits)
        else:
            torch.addmm(bias, tokens, weight.t(), out=logits)
        return logits

    def losses(self, rows: RowLoss, labels: Tensor, factor: Tensor, *, has_gradient: bool) -> Tensor:
        """Of the products that are there, with these labels, one a token and some 0; with `has_gradient` the products
        become the gradient of their sum times `factor`, a scalar or one a token."""
        logits = self._logits[: len(labels)]
        return losses_of(rows, logits, labels, factor, has_gradient=has_gradient, shard=self._shard)


def _scale(numbers: Tensor | None, factor: Tensor) -> None:
    """Multiply in place, in fp32: a scalar on the device would first be rounded to the type of the numbers."""
    if numbers is None:
        return
    for part in numbers.view(-1).split(_SCALED_AT_ONCE):
        part.copy_(part.float() * factor)
