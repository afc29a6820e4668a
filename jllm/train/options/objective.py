"""Options of the trainer: what is minimised."""

import dataclasses
from pathlib import Path

from jllm.errors import UserError
from jllm.options import option

LOSSES = ("cross_entropy", "focal", "star", "inverse", "exponentiated")
PLAIN = "cross_entropy"
PREFERENCE_LOSSES = ("dpo", "ipo", "orpo", "simpo", "apo_zero", "apo_down")
"""Losses of pairs of a chosen and a rejected answer."""
WITHOUT_REFERENCE = ("orpo", "simpo")
BETA, BETA_OF_SIMPO, GAMMA_OF_SIMPO = 0.1, 2.0, 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveOptions:
    """What is minimised."""

    loss: str = option(
        PLAIN,
        group="Objective",
        choices=(*LOSSES, *PREFERENCE_LOSSES),
        help="loss of a token: its cross-entropy, or a function of it (see docs/optimizers.md); evaluations"
        " always tell the cross-entropy. Or of preference pairs (see docs/preference.md): dpo, ipo, orpo, ...",
    )
    loss_gamma: float | None = option(
        None, most=100, above_least=True, help="the gamma of --loss focal, star, inverse and exponentiated"
    )
    fused_loss: str = option(
        "auto",
        group="Objective",
        choices=("auto", "on", "off"),
        help="make loss and gradients together with the logits: less memory, and no logits twice; auto: on GPUs, in"
        " bf16 and fp32, where the model's head is a plain product (see docs/training.md)",
    )
    beta: float | None = option(
        None,
        group="Preference pairs",
        most=1000,
        above_least=True,
        help=f"how strongly a pair pulls away from the reference  [default: {BETA:g}; simpo: {BETA_OF_SIMPO:g}]",
    )
    label_smoothing: float | None = option(
        None, most=0.5, help="dpo: the share of pairs whose answers may be the wrong way round  [default: 0]"
    )
    simpo_gamma: float | None = option(
        None, most=1000, help=f"simpo: the margin that rewards are to have  [default: {GAMMA_OF_SIMPO:g}]"
    )
    pref_ftx: float | None = option(
        None, most=1000, help="add this many times the mean cross-entropy of the chosen answer's tokens  [default: 0]"
    )
    write_ref_logps: Path | None = option(
        None,
        metavar="FOLDER",
        help="do not train: write --train_data, preference pairs, with the log-probabilities of their answers under"
        " --model, which dpo, ipo and apo compare with",
    )

    @property
    def is_preference(self) -> bool:
        """Whether the loss is one of pairs."""
        return self.loss in PREFERENCE_LOSSES

    @property
    def has_pairs(self) -> bool:
        """Whether rows are taken as preference pairs."""
        return self.is_preference or self.write_ref_logps is not None

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with a reference."""
        return self.is_preference and self.loss not in WITHOUT_REFERENCE

    @property
    def resolved_beta(self) -> float:
        """`--beta`, or its default."""
        return self.beta if self.beta is not None else BETA_OF_SIMPO if self.loss == "simpo" else BETA


def check_objective(options: ObjectiveOptions, precision: str) -> None:
    """Raises:
    UserError: an option without a loss that has it, or the other way round; a fused loss in fp16.
    """
    if options.fused_loss == "on" and precision == "fp16":
        raise UserError(
            "--fused_loss on with --precision fp16, in which its sums may overflow; give --precision bf16, or drop it"
        )
    for name, losses in (
        ("beta", PREFERENCE_LOSSES),
        ("label_smoothing", ("dpo",)),
        ("simpo_gamma", ("simpo",)),
        ("pref_ftx", PREFERENCE_LOSSES),
    ):
        value = getattr(options, name)
        if value is not None and options.loss not in losses:
            raise UserError(
                f"--{name} {value:g}: --loss {options.loss} has none; give --loss {' or '.join(losses)}, or drop it"
            )
    if options.loss_gamma is not None and options.loss not in LOSSES[1:]:
        raise UserError(
            f"--loss_gamma {options.loss_gamma:g}: --loss {options.loss} has none; give another --loss, or drop it"
        )
    if options.loss in LOSSES[1:] and options.loss_gamma is None:
        raise UserError(f"--loss {options.loss} needs --loss_gamma, such as 2")
    if options.write_ref_logps is not None and options.loss != PLAIN:
        raise UserError(
            f"--write_ref_logps trains nothing, so that --loss {options.loss} has no meaning there; drop one of them"
        )
