"""What an evaluation counts of tokens whose logits lie with several ranks, each with its part of the vocabulary.

Guarantees: the counts that one process with all logits has, on every rank; of equal logits the first is the highest.
Cost: eleven numbers a token from each rank, and of a block of logits three copies in fp32.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from jllm.data.dataset.shards import IGNORE_INDEX
from jllm.parallel.tensor.vocabulary import VocabularyShard
from jllm.train.objectives.histogram import BINS, histogram

MOST = 5
"""Of so many highest logits the lowest decides."""


@torch.no_grad()
def counted_of_part(
    logits: Tensor, labels: Tensor, shard: VocabularyShard, elements: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The summed cross-entropy, how many tokens were right and among five, scalars; losses and entropies, [BINS].

    Args:
        logits: [N, this rank's part].
        labels: [N].
        shard: which part that is.
        elements: at most so many logits at a time.
    """
    loss = torch.zeros((), device=logits.device)
    correct, top5 = (torch.zeros((), dtype=torch.int64, device=logits.device) for _ in range(2))
    losses, entropies = (torch.zeros(BINS, dtype=torch.int64, device=logits.device) for _ in range(2))
    size = max(1, elements // shard.largest)
    for block, targets in zip(logits.split(size), labels.split(size), strict=True):
        trained = targets != IGNORE_INDEX
        block = block.float()
        of_target = shard.of_targets(block, targets)
        correct += ((_first_highest(block, shard) == targets) & trained).sum()
        top5 += ((of_target >= _fifth(block, shard)) & trained).sum()
        highest, powers, total = shard.exponentials(block)
        logarithm = highest + total.log()
        ce = logarithm - of_target
        loss += torch.where(trained, ce, 0.0).sum()
        losses += histogram(ce, trained)
        # Logits of -inf have the probability 0, and add 0 to the entropy.
        logarithms = (block - logarithm[:, None]).clamp_(min=-1e30)
        entropies += histogram(-shard.total((powers * logarithms).sum(-1)) / total, trained)
    return loss, correct, top5, losses, entropies


def _first_highest(block: Tensor, shard: VocabularyShard) -> Tensor:
    """The id of each token's highest logit, the first of equals."""
    value, place = block.max(-1)
    is_highest = value == shard.highest(value)
    return shard.lowest(torch.where(is_highest, place + shard.start, shard.whole))


def _fifth(block: Tensor, shard: VocabularyShard) -> Tensor:
    """The fifth highest logit of each token, or the last one."""
    most = min(MOST, shard.whole)
    found = block.topk(min(most, block.shape[-1])).values
    everyone = shard.side_by_side(pad(found, (0, most - found.shape[-1]), value=float("-inf")))
    return everyone.topk(most).values[:, -1]
