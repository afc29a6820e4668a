"""A number that stands in for the parameters of a stage that trains nothing.

Cost: one addition a micro-batch.
"""

from typing import Any

import torch

from jllm.models.pipeline.stage import PipelineStage


def add_placeholder(stage: PipelineStage, dtype: torch.dtype, device: str) -> None:
    """Give a stage without anything to train one number that changes nothing.

    DeepSpeed's optimizers and its gradient norm need a parameter on every rank, and its pipeline needs every stage's
    output to have a gradient.
    """
    placeholder = torch.nn.Parameter(torch.zeros(1, dtype=dtype, device=device))
    stage.register_parameter("placeholder", placeholder)

    def touch(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
        nothing = (placeholder * 0).sum()
        return (output[0] + nothing, *output[1:]) if isinstance(output, tuple) else output + nothing

    stage.register_forward_hook(touch)
