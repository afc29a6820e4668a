"""What one trained token adds to the loss: its cross-entropy, or a function of it.

With p the probability of the target and CE = -log p, summed over the trained tokens:

* `cross_entropy`: CE
* `focal`: (1 - p)^gamma CE. Tokens that are known count less (Lin et al., Focal Loss for Dense Object Detection, 2017).
* `star`: CE(gamma logits) / gamma. The gradient is that of sharper logits, bounded as cross-entropy's is.
* `inverse`: (1 + p)^gamma CE. Tokens that are known count more.
* `exponentiated`: CE^gamma / gamma. Below 1, rare and noisy tokens count less.

All of them are computed in fp32 from the log-probability alone, so that p near 1 and near 0 keep their digits.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from jllm.data.dataset.shards import IGNORE_INDEX
from jllm.parallel.tensor.vocabulary import VocabularyShard, cross_entropies

LEAST = 1e-12
"""A cross-entropy below this counts as this where a power below 1 would have an infinite slope."""

TokenLoss = Callable[[Tensor, float], Tensor]


def _focal(ce: Tensor, gamma: float) -> Tensor:
    return (-torch.expm1(-ce)).clamp(min=LEAST) ** gamma * ce


def _inverse(ce: Tensor, gamma: float) -> Tensor:
    return (1 + torch.exp(-ce)) ** gamma * ce


def _exponentiated(ce: Tensor, gamma: float) -> Tensor:
    return ce.clamp(min=LEAST) ** gamma / gamma


OF_CROSS_ENTROPY: dict[str, TokenLoss] = {"focal": _focal, "inverse": _inverse, "exponentiated": _exponentiated}
"""Name → (cross-entropies, gamma) → losses."""


def summed_loss(
    logits: Tensor, labels: Tensor, kind: str, gamma: float, shard: VocabularyShard | None = None
) -> Tensor:
    """Logits [..., V] of any float type, labels [...] → the sum over trained tokens, a scalar in fp32.

    `kind` is one of the names above. With `shard` the logits are of that part of the vocabulary.
    """
    flat, targets = logits.float().view(-1, logits.shape[-1]), labels.reshape(-1)
    if kind == "star":
        flat = flat * gamma
    of_ce = OF_CROSS_ENTROPY.get(kind)
    if shard is not None:
        ce = cross_entropies(flat, targets, shard)
        total = (ce if of_ce is None else of_ce(ce, gamma)).masked_fill(targets == IGNORE_INDEX, 0.0).sum()
        return total / gamma if kind == "star" else total
    if of_ce is None:
        total = cross_entropy(flat, targets, ignore_index=IGNORE_INDEX, reduction="sum")
        return total / gamma if kind == "star" else total
    ce = cross_entropy(flat, targets, ignore_index=IGNORE_INDEX, reduction="none")
    return of_ce(ce, gamma).masked_fill(targets == IGNORE_INDEX, 0.0).sum()
