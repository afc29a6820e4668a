"""Cross-entropy summed over trained tokens; for training, and with counts and histograms for evaluation.

Works in chunks of the sequence, as `jllm.train.objectives.chunks` cuts them. Cost: the logits of one chunk in the
compute type and in fp32; where there is more than one, each is computed once more in the backward pass. Where it is
fused with the product of a plain head (`jllm.train.objectives.fused`), the logits of one chunk in the compute type, and
none of them twice. An evaluation has these as well, and goes over a chunk in blocks of `BLOCK_ELEMENTS` logits: three
of them in fp32.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from jllm.data.dataset.shards import IGNORE_INDEX
from jllm.models.pipeline.bundle import LABELS
from jllm.models.pipeline.head import Head
from jllm.train.objectives.chunks import sum_over_chunks
from jllm.train.objectives.fused import fused_loss
from jllm.train.objectives.histogram import BINS, histogram
from jllm.train.objectives.objective import Sums
from jllm.train.objectives.part_of_vocabulary import counted_of_part
from jllm.train.objectives.token_losses import summed_loss

CORRECT = "correct"
"""The reported number of trained tokens that had the highest logit."""
TOP5 = "top5"
"""The reported number of those for which fewer than five tokens had a higher logit."""
LOSSES, ENTROPIES = "losses", "entropies"
"""The reported histograms of the trained tokens' losses, and of the entropies of what the model predicts for them."""
BLOCK_ELEMENTS = 2**22


class CrossEntropy:
    """The objective of training: needs the plane `LABELS`, shifted, `IGNORE_INDEX` where not trained on.

    The loss is zero, with zero gradients, where nothing is trained on. `kind` and `gamma` choose what a token adds
    (`jllm.train.objectives.token_losses`); `is_fused`, whether that is made together with the logits where the head is
    a plain one.
    """

    def __init__(self, kind: str = "cross_entropy", gamma: float = 1.0, *, is_fused: bool = False) -> None:
        self._kind, self._gamma, self._is_fused = kind, gamma, is_fused

    def __call__(self, hidden: Tensor, head: Head, fields: Mapping[str, Tensor], gradient: float | None = None) -> Sums:
        """The summed loss."""
        if self._is_fused and head.plain is not None:
            return Sums(loss=fused_loss(hidden, head, fields[LABELS], self._kind, self._gamma, gradient))

        def of(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
            return (summed_loss(logits, labels, self._kind, self._gamma, head.shard),)

        [loss] = sum_over_chunks(of, hidden, head, fields[LABELS])
        return Sums(loss=loss)


class CrossEntropyAndAccuracy:
    """The objective of evaluation: the cross-entropy, and `CORRECT`, `TOP5`, `LOSSES`, `ENTROPIES`."""

    def __call__(self, hidden: Tensor, head: Head, fields: Mapping[str, Tensor], gradient: float | None = None) -> Sums:
        """The summed cross-entropy, and what is counted of the tokens."""

        def of(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
            if head.shard is not None:
                loss, *counts = counted_of_part(logits.flatten(0, -2), labels.flatten(), head.shard, BLOCK_ELEMENTS)
            else:
                loss, *counts = _counted(logits.flatten(0, -2), labels.flatten())
                counts.insert(0, (logits.argmax(-1) == labels).sum())
            if torch.is_grad_enabled():
                loss = summed_loss(logits, labels, "cross_entropy", 1.0, head.shard)
            return (loss, *counts)

        loss, correct, top5, losses, entropies = sum_over_chunks(of, hidden, head, fields[LABELS])
        return Sums(loss=loss, reported={CORRECT: correct, TOP5: top5, LOSSES: losses, ENTROPIES: entropies})


@torch.no_grad()
def _counted(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits [N, V] and labels [N] → the summed cross-entropy, `TOP5`, scalars, `LOSSES` and `ENTROPIES`, [BINS]."""
    loss = torch.zeros((), device=logits.device)
    top5 = torch.zeros((), dtype=torch.int64, device=logits.device)
    losses, entropies = (torch.zeros(BINS, dtype=torch.int64, device=logits.device) for _ in range(2))
    size = max(1, BLOCK_ELEMENTS // logits.shape[-1])
    for block, targets in zip(logits.split(size), labels.split(size), strict=True):
        trained = targets != IGNORE_INDEX
        places = targets.clamp(min=0)[:, None]
        fifth = block.topk(min(5, block.shape[-1])).values[:, -1:]
        top5 += ((block.gather(1, places) >= fifth)[:, 0] & trained).sum()
        logarithms = block.float().log_softmax(-1)
        ce = -logarithms.gather(1, places)[:, 0]
        loss += torch.where(trained, ce, 0.0).sum()
        losses += histogram(ce, trained)
        # Logits of -inf have the probability 0, and add 0 to the entropy.
        logarithms.clamp_(min=-1e30)
        entropies += histogram(-logarithms.exp().mul_(logarithms).sum(-1), trained)
    return loss, top5, losses, entropies
