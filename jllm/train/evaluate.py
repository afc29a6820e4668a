"""Evaluation: every row of a data set once, loss and accuracy averaged exactly over its trained tokens.

Rows are dealt to the pipelines as in training; the last, short batch is filled with fully masked rows. Cost: one
forward pass over the set.
"""

import dataclasses
import math
from collections.abc import Iterable

from jllm.train.agreement import Agreement
from jllm.train.data import Data
from jllm.train.engine import Engine
from jllm.train.loss import TokenLoss
from jllm.train.stream import eval_micro_batches, eval_steps

MICRO_BATCHES_PER_STAGE = 4
"""A forward-only pass keeps one micro-batch a stage, so a step may have many: the pipeline fills and drains rarely."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The mean loss over `tokens` trained tokens, of which the model ranked `correct` first."""

    loss: float
    tokens: int
    correct: int

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def accuracy(self) -> float:
        """The share of trained tokens that had the highest logit."""
        return self.correct / max(self.tokens, 1)


def evaluate(engine: Engine, loss: TokenLoss, agreement: Agreement, data: Data) -> Evaluation:
    """Evaluate the model as it is; every process calls it."""
    share = dataclasses.replace(
        data.share, accumulation=max(data.share.accumulation, MICRO_BATCHES_PER_STAGE * engine.num_stages)
    )
    loss.set_sum()
    steps = eval_steps(data.index, share) if data.index is not None else None
    total, tokens = 0.0, 0
    for count in eval_micro_batches(data.facts.num_rows, share):
        step, facts = agreement.step(steps)
        total += engine.eval_step(step.micro_batches if step is not None else None, facts.length, count)
        tokens += facts.trained_tokens
    return Evaluation(loss=total / max(tokens, 1), tokens=tokens, correct=agreement.total(loss.correct))


def mean_loss(evaluations: Iterable[Evaluation]) -> float:
    """The loss over all sets' tokens together."""
    found = list(evaluations)
    return sum(each.loss * each.tokens for each in found) / max(sum(each.tokens for each in found), 1)
