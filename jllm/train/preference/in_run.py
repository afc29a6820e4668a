"""Steps and evaluations on preference pairs: where references come from, and what is recorded.

The reference of a set stands in its rows (`ref_logps`), or with adapters is the model without them: a forward pass over
the same micro-batches, adapters and dropout off, before the step. A run holds one model either way.

Cost of the second way: a forward pass a step, and some numbers a micro-batch.
"""

import contextlib
import dataclasses
from collections import deque
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from jllm.train.config import TrainConfig
from jllm.train.data.loader import Step, eval_micro_batches, eval_steps
from jllm.train.data.open import Data
from jllm.train.distributed.agreement import Agreement
from jllm.train.distributed.deepspeed_engine import TrainingEngine
from jllm.train.evaluate import MICRO_BATCHES_PER_STAGE, Exchange
from jllm.train.fused_loss import pair_loss, wants_fused_loss
from jllm.train.objectives.objective import ObjectiveInUse
from jllm.train.objectives.preference import NAMES_OF_SUMS, PAIRS, PairSums, Preference, ReferenceLogps
from jllm.train.preference.watch import PairWatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairEvaluation:
    """The sums over the pairs of an evaluation set."""

    sums: PairSums

    @property
    def loss(self) -> float:
        """The mean over pairs."""
        return self.sums.loss / self.sums.pairs

    @property
    def tokens(self) -> int:
        """What the mean is over: pairs."""
        return int(self.sums.pairs)

    def record(self) -> dict[str, Any]:
        """As the records of a run have it."""
        return {"eval_loss": self.loss, "eval_pairs": self.tokens, **self.sums.record()}


class PairsOfRun:
    """What a run on pairs does around its steps; on every process.

    Args:
        engine: of the run.
        in_use: the objective of this stage.
        agreement: the processes.
        data: what is trained on.
        config: the options.
        is_fresh: the run starts from the reference itself.
    """

    def __init__(
        self,
        engine: TrainingEngine,
        in_use: ObjectiveInUse,
        agreement: Agreement,
        data: Data,
        config: TrainConfig,
        *,
        is_fresh: bool,
    ) -> None:
        self._config, self._engine = config, engine
        self._in_use, self._agreement, self._data = in_use, agreement, data
        # A warning about the start is of runs without what makes training differ from a forward pass.
        starts = is_fresh and config.needs_reference and not config.dropout and config.neftune_alpha is None
        self.watch = PairWatch(compares=config.needs_reference, starts=starts)

    def objective(self, step: Step | None, length: int, count: int, *, data: Data | None = None) -> Preference:
        """The objective of the next step, its references made where rows have none; every process calls it.

        Args:
            step: this pipeline's share, on its reader.
            length, count: of its micro-batches.
            data: where it is of another set than that of training.
        """
        references: deque[Tensor] | None = None
        if self._config.needs_reference and not (data or self._data).share.references:
            made = ReferenceLogps(is_fused=wants_fused_loss(self._config))
            self._in_use.use(made)
            with _without_adapters(self._engine.module):
                self._engine.eval_step(step.micro_batches if step is not None else None, length, count)
            references = made.found
        return Preference(pair_loss(self._config), is_fused=wants_fused_loss(self._config), references=references)

    def sums(self) -> PairSums:
        """What the objective in use found since it is, on all processes."""
        found = self._in_use.all_reported(PAIRS, len(NAMES_OF_SUMS))
        if not self._agreement.place.is_first_slice:  # the slices of a stage counted the same pairs
            found = [0.0] * len(found)
        return PairSums(**dict(zip(NAMES_OF_SUMS, self._agreement.sums(found), strict=True)))

    def evaluate(self, data: Data, exchange: Exchange) -> PairEvaluation | None:
        """As `jllm.train.evaluate.evaluate`, over pairs."""
        least = MICRO_BATCHES_PER_STAGE * self._engine.num_stages
        share = dataclasses.replace(data.share, accumulation=max(data.share.accumulation, least))
        steps = eval_steps(data.index, share) if data.index is not None else None
        total = PairSums()
        for count in eval_micro_batches(data.facts.num_rows, share):
            step, facts = exchange(steps)
            if facts.request.ending is not None:
                return None
            self._in_use.use(self.objective(step, facts.length, count, data=data))
            self._engine.eval_step(step.micro_batches if step is not None else None, facts.length, count)
            total = total + self.sums()
        return PairEvaluation(sums=total)


def pairs_of_run(
    engine: TrainingEngine, in_use: ObjectiveInUse, agreement: Agreement, data: Data, config: TrainConfig, *, step: int
) -> PairsOfRun | None:
    """What a run does that has made `step` steps; None where it is not on pairs."""
    if not config.is_preference:
        return None
    is_fresh = step == 0 and config.from_ckpt is None
    return PairsOfRun(engine, in_use, agreement, data, config, is_fresh=is_fresh)


@contextlib.contextmanager
def _without_adapters(model: nn.Module) -> Iterator[None]:
    from jllm.models.adapters.lora import without_adapters  # which a run without adapters need not import

    with without_adapters(model):
        yield
