"""Evaluation: every row of a data set once, loss and accuracy averaged exactly over its trained tokens.

Quantiles of the tokens' losses, and of the entropies of what the model predicts for them, come from histograms whose
bins are within 0.8 % (`jllm.train.objectives.histogram`); they are the same however rows are divided.

Rows are dealt to the pipelines as in training; the last, short batch is filled with fully masked rows. A set has at
least one trained token: without any, every model would have the same loss. Cost: one forward pass over the set.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from jllm.errors import UserError
from jllm.models.weights.source import ModelInfo
from jllm.train.config import TrainConfig, named_folders
from jllm.train.data.batching import EpochSteps
from jllm.train.data.loader import Step, eval_micro_batches, eval_steps
from jllm.train.data.open import Data, open_evaluation_data
from jllm.train.distributed.agreement import Agreement, StepFacts
from jllm.train.distributed.deepspeed_engine import TrainingEngine
from jllm.train.objectives.cross_entropy import CORRECT, ENTROPIES, LOSSES, TOP5, CrossEntropyAndAccuracy
from jllm.train.objectives.histogram import BINS, quantile
from jllm.train.objectives.objective import ObjectiveInUse
from jllm.train.shape import RunShape
from jllm.train.triggers import Cadence

MICRO_BATCHES_PER_STAGE = 4
"""A forward-only pass keeps one micro-batch a stage, so a step may have many: the pipeline fills and drains rarely."""


LARGE_SHARE = 0.15
"""Where evaluations take more of a run's time, the run says so."""
PERCENTILES = (10, 50, 90, 99)
"""Of losses and entropies, in the records."""
Exchange = Callable[[Iterator[Step] | None], tuple[Step | None, StepFacts]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The mean loss over `tokens` trained tokens, of which the model ranked `correct` first, `top5` among five.

    `losses` and `entropies` are histograms of the tokens.
    """

    loss: float
    tokens: int
    correct: int
    top5: int
    losses: Sequence[int]
    entropies: Sequence[int]

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def accuracy(self) -> float:
        """The share of trained tokens that had the highest logit."""
        return self.correct / self.tokens

    def record(self) -> dict[str, Any]:
        """As the records of a run have it."""
        found: dict[str, Any] = {
            "eval_loss": self.loss,
            "eval_tokens": self.tokens,
            "perplexity": self.perplexity,
            "accuracy": self.accuracy,
            "top5_accuracy": self.top5 / self.tokens,
        }
        for name, counts in (("loss", self.losses), ("entropy", self.entropies)):
            found |= {f"{name}_p{percent}": quantile(counts, percent / 100) for percent in PERCENTILES}
        return found


def open_evaluation_sets(
    config: TrainConfig, shape: RunShape, agreement: Agreement, model: ModelInfo
) -> dict[str, Data]:
    """The sets of `--eval_data` by name.

    Raises:
        UserError: on every process: as for training data, or a set has nothing to evaluate.
    """
    found = {}
    for name, folder in named_folders(config.eval_data).items():
        try:
            found[name] = open_evaluation_data(folder, config, shape, agreement, model)
        except UserError as error:  # the same on every process
            raise UserError(f"--eval_data {name}: {error}") from None
    return found


def evaluate(
    engine: TrainingEngine, objective: ObjectiveInUse, agreement: Agreement, data: Data, exchange: Exchange
) -> Evaluation | None:
    """Evaluate the model as it is; every process calls it. None where the run was asked to end meanwhile.

    Args:
        engine, objective: of the run.
        agreement: the processes.
        data: the set.
        exchange: reads a step, shares it, and what all ask for.
    """
    share = dataclasses.replace(
        data.share, accumulation=max(data.share.accumulation, MICRO_BATCHES_PER_STAGE * engine.num_stages)
    )
    objective.use(CrossEntropyAndAccuracy())
    steps = eval_steps(data.index, share) if data.index is not None else None
    total, tokens = 0.0, 0
    for count in eval_micro_batches(data.facts.num_rows, share):
        step, facts = exchange(steps)
        if facts.request.ending is not None:
            return None
        total += engine.eval_step(step.micro_batches if step is not None else None, facts.length, count)
        tokens += facts.trained_tokens
    mine = [
        objective.reported(CORRECT),
        objective.reported(TOP5),
        *objective.all_reported(LOSSES, BINS),
        *objective.all_reported(ENTROPIES, BINS),
    ]
    # The slices of a stage counted the same tokens.
    correct, top5, *counts = agreement.totals(mine if agreement.place.is_first_slice else [0] * len(mine))
    return Evaluation(
        loss=total / tokens, tokens=tokens, correct=correct, top5=top5, losses=counts[:BINS], entropies=counts[BINS:]
    )


class MeanLoss(Protocol):
    """What an evaluation of any kind tells: a mean, and over how many tokens or pairs it is."""

    @property
    def loss(self) -> float: ...

    @property
    def tokens(self) -> int: ...


def mean_loss(evaluations: Iterable[MeanLoss]) -> float:
    """The loss over all sets' tokens together."""
    found = list(evaluations)
    return sum(each.loss * each.tokens for each in found) / sum(each.tokens for each in found)


def warnings_of_share(
    training: Data, evaluation: Iterable[Data], cadence: Cadence, epochs: EpochSteps, *, step: int, total_steps: int
) -> list[str]:
    """What to say of evaluations that take much of a run's time; the arguments are those of `evaluation_share`."""
    share = evaluation_share(training, evaluation, cadence, epochs, step=step, total_steps=total_steps)
    if share <= LARGE_SHARE:
        return []
    return [f"evaluation takes about {share:.0%} of the run; raise --steps_per_eval, or cut --eval_data"]


def evaluation_share(
    training: Data, evaluation: Iterable[Data], cadence: Cadence, epochs: EpochSteps, *, step: int, total_steps: int
) -> float:
    """About how much of a run's time from `step` on evaluations take: a forward pass is a third of a training step."""
    evaluation = list(evaluation)
    if not evaluation:
        return 0.0  # without a look at every step
    first = step + 1
    times = (first == 1) + sum(cadence.evaluates(each) for each in range(first, total_steps + 1))
    sets = [training, *evaluation]
    known = all(data.facts.tokens for data in sets)
    train, *evals = ((data.facts.tokens if known else data.facts.num_rows) or 0 for data in sets)
    train_share = train * (total_steps - step) / epochs.counts[0]
    evaluation_share = times * sum(evals) / 3
    return evaluation_share / max(evaluation_share + train_share, 1)
