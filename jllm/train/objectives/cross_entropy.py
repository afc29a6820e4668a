"""Cross-entropy summed over trained tokens; for training, and with the count of right answers for evaluation.

Works in chunks of the sequence, as `jllm.train.objectives.chunks` cuts them. Cost: the logits of one chunk in the
compute type and in fp32; where there is more than one, each is computed once more in the backward pass.
"""

from collections.abc import Mapping

from torch import Tensor
from torch.nn.functional import cross_entropy

from jllm.data.dataset.shards import IGNORE_INDEX
from jllm.models.pipeline.bundle import LABELS
from jllm.models.pipeline.head import Head
from jllm.train.objectives.chunks import sum_over_chunks
from jllm.train.objectives.objective import Sums

CORRECT = "correct"
"""The reported number of trained tokens that had the highest logit."""


class CrossEntropy:
    """The objective of training: needs the plane `LABELS`, shifted, `IGNORE_INDEX` where not trained on.

    The loss is zero, with zero gradients, where nothing is trained on.
    """

    def __call__(self, hidden: Tensor, head: Head, fields: Mapping[str, Tensor]) -> Sums:
        """The summed cross-entropy."""
        [loss] = sum_over_chunks(lambda logits, labels: (_summed(logits, labels),), hidden, head, fields[LABELS])
        return Sums(loss=loss)


class CrossEntropyAndAccuracy:
    """The objective of evaluation: the same loss, and `CORRECT`."""

    def __call__(self, hidden: Tensor, head: Head, fields: Mapping[str, Tensor]) -> Sums:
        """The summed cross-entropy, and how many tokens were ranked first."""
        loss, correct = sum_over_chunks(
            lambda logits, labels: (_summed(logits, labels), (logits.argmax(-1) == labels).sum()),
            hidden,
            head,
            fields[LABELS],
        )
        return Sums(loss=loss, reported={CORRECT: correct})


def _summed(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits [..., V] of any float type, labels [...] → scalar, fp32."""
    return cross_entropy(
        logits.float().view(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=IGNORE_INDEX, reduction="sum"
    )
