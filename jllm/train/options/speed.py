"""Options of the trainer: what makes steps faster."""

import dataclasses

from jllm.options import option


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeedOptions:
    """What makes steps faster, and changes results by rounding alone."""

    compile: str = option(
        "auto",
        group="Speed",
        choices=("auto", "on", "off"),
        help="compile decoder layers; auto: on CUDA with bf16 or fp32, for families that were shown to be right",
    )
