"""Noise on the embeddings while a model trains (Jain et al., NEFTune: Noisy Embeddings Improve Instruction Finetuning,
2023): uniform between -m and m, with m = alpha / sqrt(row length x width), padding included.

Guarantees: evaluations have none. The noise comes from the random state that checkpoints keep, so a run that goes on
has the noise that it would have had; slices of a stage have the same state, and so the same noise. Cost: one tensor of
the embedding's output.
"""

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from jllm.models.pipeline.span import StageSpan


def attach_noise(model: PreTrainedModel, span: StageSpan, alpha: float) -> None:
    """Let the embedding of the first stage be noisy in training mode; other stages have none.

    Args:
        model: loaded and sealed, and adapted.
        span: of the stage.
        alpha: how much noise.
    """
    if span.is_first:
        embedding = model.get_input_embeddings()
        assert isinstance(embedding, nn.Module)
        embedding.register_forward_hook(functools.partial(_add_noise, alpha))


def _add_noise(alpha: float, embedding: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    if not embedding.training:
        return output
    most = alpha / math.sqrt(output.shape[-2] * output.shape[-1])
    return output + torch.empty_like(output).uniform_(-most, most)
