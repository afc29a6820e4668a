"""Options of the trainer: what is minimised."""

import dataclasses

from jllm.errors import UserError
from jllm.options import option

LOSSES = ("cross_entropy", "focal", "star", "inverse", "exponentiated")
PLAIN = "cross_entropy"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveOptions:
    """What is minimised."""

    loss: str = option(
        PLAIN,
        group="Objective",
        choices=LOSSES,
        help="loss of a token: its cross-entropy, or a function of it (see docs/optimizers.md); evaluations"
        " always tell the cross-entropy",
    )
    loss_gamma: float | None = option(
        None, most=100, above_least=True, help="the gamma of --loss, for all but cross_entropy"
    )


def check_objective(options: ObjectiveOptions) -> None:
    """Raises:
    UserError: a gamma without a loss that has one, or the other way round.
    """
    if options.loss == PLAIN and options.loss_gamma is not None:
        raise UserError(
            f"--loss_gamma {options.loss_gamma:g}: --loss cross_entropy has none; give another --loss, or drop it"
        )
    if options.loss != PLAIN and options.loss_gamma is None:
        raise UserError(f"--loss {options.loss} needs --loss_gamma, such as 2")
