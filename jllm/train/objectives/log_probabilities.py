"""Log-probabilities of the trained tokens of a micro-batch, and their sums over documents.

Only trained positions come to the head, a chunk of them at a time (`jllm.models.pipeline.head`). No logits are kept:
each chunk's are made again in the backward pass, from the hidden states. All is fp32 from the logits on.

Where the head is a plain product, a chunk's logits are written into one buffer in the compute type and overwritten by
their gradient there (`jllm.train.objectives.logit_rows`), as `jllm.train.objectives.fused` does; here the gradients of
the tokens are not known before all sums are, so the product is made twice.

Sums are of whole numbers of 2^-32, in 64 bits: they are the same in whatever order a device adds, so that a step
repeated is the same to the last bit, and ten thousand tokens lose no digits. Ranks that share the tokens of rows add up
theirs, and all of them have the sums of whole documents; the gradient of a sum goes to each rank's own tokens.

Costs: four products; the logits of a chunk; one wait for the device, to know how many tokens are trained on; where
ranks share rows, three numbers for each token of a micro-batch, summed over them.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from jllm.data.dataset.shards import IGNORE_INDEX
from jllm.models.pipeline.head import Head, tokens_of_a_chunk
from jllm.models.sequence_parallel.share import OwnPlanes
from jllm.parallel.sequence.group import SequenceGroup
from jllm.parallel.tensor.vocabulary import cross_entropies
from jllm.train.objectives.fused import ALIGNED, LogitChunks, add_shares
from jllm.train.objectives.logit_rows import RowLoss

_ONE = 2.0**32
_LEAST = -(2.0**20)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DocumentSums:
    """Of each document of a micro-batch, by its number there; 0 where there is none of that number.

    Attributes:
        logps: [D] fp64, the summed log-probabilities of its trained tokens.
        counts: [D] int64, how many these are.
    """

    logps: Tensor
    counts: Tensor


def document_sums(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    documents: Tensor,
    *,
    is_fused: bool,
    shared: OwnPlanes | None = None,
) -> DocumentSums:
    """The sums of a micro-batch.

    Args:
        hidden: [B, S, width].
        head: gives the logits.
        labels: [B, S], `IGNORE_INDEX` where not trained on.
        documents: [B, S] the number of each token's document in the micro-batch, below B x S.
        is_fused: whether a plain head's product is fused with the loss.
        shared: what of whole rows these tokens are, where ranks share them.
    """
    group, size = (None, labels.numel()) if shared is None else (shared.group, shared.tokens)
    size += size % 2
    tokens, targets = hidden.flatten(0, -2), labels.flatten()
    trained = (targets != IGNORE_INDEX).nonzero()[:, 0]
    count = len(trained)
    # One is there always, so that everything has its gradient; products of odd shapes are slow on GPUs.
    aligned = 1 if tokens.device.type == "cpu" else ALIGNED
    trained = pad(trained, (0, max(-count % aligned, (count == 0) * aligned)))
    tokens, targets, numbers = (each.index_select(0, trained) for each in (tokens, targets, documents.flatten()))
    targets[count:] = IGNORE_INDEX
    # Ranks with parts of the vocabulary find their logits one by one.
    is_fused = is_fused and head.plain is not None and head.shard is None
    logps = _fused(tokens, head, targets) if is_fused else _chunked(tokens, head, targets)
    counts = torch.zeros(size, dtype=torch.int64, device=labels.device)
    counts.index_add_(0, numbers, (targets != IGNORE_INDEX).long())
    sums: Tensor = _ExactSums.apply(logps, numbers, size, group)  # type: ignore[no-untyped-call]
    return DocumentSums(logps=sums, counts=counts if group is None else group.total(counts))


class _ExactSums(torch.autograd.Function):
    """Numbers [n] and where each belongs [n] → their sums [size] in fp64, over all ranks of a group; the same in any
    order."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, numbers: Tensor, size: int, group: SequenceGroup | None) -> Tensor:
        """The sums; NaN where a value is not finite."""
        ctx.save_for_backward(numbers)
        ctx.dtype = values.dtype
        sound = torch.isfinite(values)
        whole = (values.double().clamp(min=_LEAST, max=-_LEAST).nan_to_num(0.0) * _ONE).round().long()
        found = torch.zeros(size, 2, dtype=torch.int64, device=values.device)
        found.index_add_(0, numbers, torch.stack([whole, (~sound).long()], 1))
        sums, bad = (found if group is None else group.total(found)).unbind(1)
        return torch.where(bad > 0, torch.nan, sums.double() / _ONE)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """Each value's is that of its sum, which every rank has whole."""
        (numbers,) = ctx.saved_tensors
        return gradient.index_select(0, numbers).to(ctx.dtype), None, None, None


def _chunked(tokens: Tensor, head: Head, targets: Tensor) -> Tensor:
    """[n] of tokens [n, width], 0 where there is no target."""

    def of_chunk(tokens: Tensor, targets: Tensor) -> Tensor:
        logits = head(tokens).float()
        if head.shard is not None:
            found = -cross_entropies(logits, targets.clamp(min=0), head.shard)
        else:
            found = logits.gather(-1, targets.clamp(min=0)[:, None])[:, 0] - logits.logsumexp(-1)
        return found.masked_fill(targets == IGNORE_INDEX, 0.0)

    size = tokens_of_a_chunk(head.vocabulary)
    parts = zip(tokens.split(size), targets.split(size), strict=True)
    if torch.is_grad_enabled():
        return torch.cat([checkpoint(of_chunk, *part, use_reentrant=False) for part in parts])
    return torch.cat([of_chunk(*part) for part in parts])


def _fused(tokens: Tensor, head: Head, targets: Tensor) -> Tensor:
    plain = head.plain
    assert plain is not None
    rows = RowLoss(factor=plain.factor, cap=plain.cap)
    found: Tensor = _FusedLogps.apply(  # type: ignore[no-untyped-call]
        head.before(tokens), plain.linear.weight, plain.linear.bias, targets, rows
    )
    return found


class _FusedLogps(torch.autograd.Function):
    """Hidden states [n, width], weight [V, width], bias [V] or None, labels [n] → log-probabilities [n]."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, rows: RowLoss) -> Tensor:
        """The log-probabilities, chunk by chunk."""
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.rows = rows
        chunks = LogitChunks(len(hidden), weight, is_trained=False)
        found, one = [], torch.ones((), device=hidden.device)
        for place in range(0, len(hidden), chunks.size):
            tokens = hidden[place : place + chunks.size]
            chunks.multiply(tokens, weight, bias)
            losses = chunks.losses(rows, labels[place : place + chunks.size], one, has_gradient=False)
            found.append(-losses)
        return torch.cat(found)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The same products again, and of each chunk's gradient two more."""
        hidden, weight, bias, labels = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        of_hidden = torch.empty_like(hidden) if wanted[0] else None
        of_weight = torch.empty_like(weight) if wanted[1] else None
        of_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and wanted[2] else None
        chunks = LogitChunks(len(hidden), weight, is_trained=of_weight is not None)
        for place in range(0, len(hidden), chunks.size):
            tokens = hidden[place : place + chunks.size]
            logits = chunks.multiply(tokens, weight, bias)
            part = slice(place, place + chunks.size)
            chunks.losses(ctx.rows, labels[part], -gradient[part], has_gradient=True)
            if of_hidden is not None:
                torch.mm(logits, weight, out=of_hidden[part])
            add_shares(logits, tokens, of_weight, of_bias, is_first=place == 0)
        return of_hidden, of_weight, of_bias.to(weight.dtype) if of_bias is not None else None, None, None
