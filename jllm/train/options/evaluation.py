"""Options of the trainer: what is evaluated, and when."""

import dataclasses

from jllm.options import option
from jllm.train.limits import MOST_STEPS


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """What is evaluated, and when."""

    eval_data: tuple[str, ...] = option(
        (),
        group="Evaluation",
        metavar="[NAME=]FOLDER",
        help="shards to evaluate on, every row, in order; may be given several times",
    )
    steps_per_eval: float = option(
        0.0,
        most=MOST_STEPS,
        whole_from_1=True,
        help="steps between evaluations; below 1: a share of an epoch; 0: at the end of each epoch",
    )
    early_stop: int = option(0, help="stop after this many consecutive rebounds of the evaluation loss; 0: never")
