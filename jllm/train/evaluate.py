"""Evaluation: every row of a data set once, the loss averaged exactly over its trained tokens.

Rows are dealt to the pipelines as in training; the last, short batch is filled with fully masked rows. Cost: one
forward pass over the set.
"""

import dataclasses
import math

from jllm.train.agreement import Agreement
from jllm.train.config import Layout
from jllm.train.engine import Engine
from jllm.train.loss import TokenLoss
from jllm.train.stream import ShardIndex, Share, eval_steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The mean loss over `tokens` trained tokens."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def evaluate(
    engine: Engine,
    loss: TokenLoss,
    agreement: Agreement,
    layout: Layout,
    *,
    index: ShardIndex | None,
    share: Share,
    num_rows: int,
) -> Evaluation:
    """Evaluate the model as it is. `index` on readers only; `num_rows` (of the whole set) everywhere."""
    loss.set_sum()
    steps = eval_steps(index, share) if index is not None else None
    total, tokens = 0.0, 0
    for _ in range(-(-num_rows // layout.global_batch)):
        step = next(steps) if steps is not None else None
        facts = agreement.step(step)
        micro_batches = step.micro_batches if step is not None else None
        total += engine.eval_step(micro_batches, facts.length, layout.accumulation)
        tokens += facts.trained_tokens
    return Evaluation(loss=total / max(tokens, 1), tokens=tokens)
