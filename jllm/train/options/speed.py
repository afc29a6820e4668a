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
    activation_memory_budget: float = option(
        1.0,
        group="Speed",
        most=1.0,
        help="of what compiled layers keep for the backward pass, the share that they may keep; the rest is computed"
        " again there, element-wise operations before products; 0: all but a layer's inputs",
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
    UserError: a budget of compiled layers without such; fp8 products of a model that has other weights than bf16, or is
        frozen.
    """
    if options.activation_memory_budget < 1 and options.compile == "off":
        raise UserError(
            f"--activation_memory_budget {options.activation_memory_budget:g} is for compiled layers, and --compile off"
            " compiles none; drop one, or give --checkpoint_grad_interval"
        )
    if options.fp8 == "off":
        return
    if has_adapters:
        raise UserError(
            f"--fp8 {options.fp8} is for a model that trains itself, and this one is frozen beside adapters; drop it"
        )
    if precision != "bf16":
        raise UserError(f"--fp8 {options.fp8} with --precision {precision}: give --precision bf16, or drop it")
