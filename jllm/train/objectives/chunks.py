"""Sums over the logits of a micro-batch, a chunk of its tokens at a time; never are all logits there.

A chunk has at most `CHUNK_ELEMENTS` logits (`jllm.models.pipeline.head`). One chunk is computed as if there were no
chunks: the same operations on tensors of the same shapes. Where there are more, each is recomputed in the backward pass
and the peak is one chunk x vocabulary; sums over chunks are in another order, so they may differ in the last bits, and
the gradients of the head's weights are added up in the type of the weights.

Cost of more than one chunk: the head's forward pass twice.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from jllm.models.pipeline.head import Head, tokens_of_a_chunk

Summed = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
"""Logits [..., V] and labels [...] → scalars."""


def sum_over_chunks(of: Summed, hidden: Tensor, head: Head, labels: Tensor) -> tuple[Tensor, ...]:
    """The scalars of all tokens together.

    Args:
        of: the scalars of a chunk.
        hidden: [B, S, width].
        head: gives the logits.
        labels: [B, S].
    """

    def of_chunk(hidden: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        return of(head(hidden), labels)

    size = tokens_of_a_chunk(head.vocabulary)
    if labels.numel() <= size:
        return of_chunk(hidden, labels)
    totals: tuple[Tensor, ...] = ()
    for tokens, targets in zip(hidden.flatten(0, -2).split(size), labels.flatten().split(size), strict=True):
        if torch.is_grad_enabled():
            found = checkpoint(of_chunk, tokens, targets, use_reentrant=False)
        else:
            found = of_chunk(tokens, targets)
        totals = tuple(total + each for total, each in zip(totals, found, strict=True)) if totals else found
    return totals
