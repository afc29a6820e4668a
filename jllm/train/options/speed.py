"""Options of the trainer: what makes steps faster."""

import dataclasses

from jllm.errors import UserError
from jllm.options import option

FP8_RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
"""By torchao's names."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeedOptions:
    """What makes steps faster, and changes results by rounding alone."""

    compile: str = option(
        "auto",
        group="Speed",
        choices=("auto", "on", "off"),
        help="compile decoder layers; auto: on CUDA with bf16 or fp32, for families that were shown to be right",
    )
    fp8: str = option(
        "off",
        group="Speed",
        choices=("off", *FP8_RECIPES),
        help="have linear maps of decoder layers multiply in 8-bit floats, scaled by tensor or by row, weights staying"
        " bf16: fastest with large matrices and compiled layers; needs torchao and a GPU of capability 8.9 or more (see"
        " docs/training.md)",
    )


def check_speed(options: SpeedOptions, precision: str, *, has_adapters: bool) -> None:
    """Raises:
    UserError: fp8 products of a model that has other weights than bf16, or is frozen.
    """
    if options.fp8 == "off":
        return
    if has_adapters:
        raise UserError(
            f"--fp8 {options.fp8} is for a model that trains itself, and this one is frozen beside adapters; drop it"
        )
    if precision != "bf16":
        raise UserError(f"--fp8 {options.fp8} with --precision {precision}: give --precision bf16, or drop it")
