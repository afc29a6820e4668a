"""Token-exact loss.

For one optimizer step over the whole world the loss is (sum of the token losses) / (number of trained tokens), however
the tokens fall on micro-batches and ranks. DeepSpeed divides what the last stage returns by the number of
micro-batches and averages over data-parallel ranks, in the gradient and in the reported loss alike; `TokenLoss`
multiplies by both beforehand, so the two cancel and what is left is the sum over the step divided by its trained
tokens.

Cost: the logits of one micro-batch in fp32.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from jllm.data.dataset.shards import IGNORE_INDEX


class TokenLoss:
    """Cross-entropy summed over the trained tokens of a micro-batch, times `scale`.

    Args of a call: logits [B, S, V] of any float type, targets [B, S] int64, already shifted, `IGNORE_INDEX` where not
    trained on. Returns a scalar in fp32; zero, with zero gradients, where nothing is trained on.
    """

    def __init__(self) -> None:
        self.scale = 1.0
        self._correct: Tensor | None = None
        self._counting = False

    def set_step(self, *, trained_tokens: int, micro_batches: int, data_parallel_size: int) -> None:
        """The next forward passes belong to a step with this many trained tokens in the whole world."""
        self.scale = micro_batches * data_parallel_size / max(trained_tokens, 1)
        self._counting = False

    def set_sum(self) -> None:
        """The next forward passes return plain sums, for evaluation, and count the targets ranked first."""
        self.scale = 1.0
        self._counting, self._correct = True, None

    @property
    def correct(self) -> int:
        """Targets that had the highest logit, since `set_sum`; 0 on stages that have no loss."""
        return 0 if self._correct is None else int(self._correct)

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        vocabulary = logits.shape[-1]
        if self._counting:
            hits = (logits.argmax(-1) == targets).sum()
            self._correct = hits if self._correct is None else self._correct + hits
        summed = cross_entropy(
            logits.float().view(-1, vocabulary), targets.reshape(-1), ignore_index=IGNORE_INDEX, reduction="sum"
        )
        return summed * torch.tensor(self.scale, dtype=torch.float32, device=summed.device)
