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
    fused_loss: str = option(
        "auto",
        group="Objective",
        choices=("auto", "on", "off"),
        help="make loss and gradients together with the logits: less memory, and no logits twice; auto: on GPUs, in"
        " bf16 and fp32, where the model's head is a plain product (see docs/training.md)",
    )


def check_objective(options: ObjectiveOptions, precision: str) -> None:
    """Raises:
    UserError: a gamma without a loss that has one, or the other way round; a fused loss in fp16.
    """
    if options.fused_loss == "on" and precision == "fp16":
        raise UserError(
            "--fused_loss on with --precision fp16, in which its sums may overflow; give --precision bf16, or drop it"
        )
    if options.loss == PLAIN and options.loss_gamma is not None:
        raise UserError(
            f"--loss_gamma {options.loss_gamma:g}: --loss cross_entropy has none; give another --loss, or drop it"
        )
    if options.loss != PLAIN and options.loss_gamma is None:
        raise UserError(f"--loss {options.loss} needs --loss_gamma, such as 2")
