"""Helpers: a whole model and its stages chained in one process, side by side."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from jllm.models.attention import packing
from jllm.models.pipeline.carving import published_names, tied_parameter
from jllm.models.pipeline.head import Head
from jllm.models.pipeline.span import spans_of
from jllm.models.pipeline.stage import Objective, PipelineStage, accepted_arguments
from jllm.models.sequence_parallel.share import SequenceShare
from jllm.models.weights.loading import load_stage

CUTS = ([0, 8], [0, 1, 3, 5, 7, 8])
"""In half layers of four: one stage, and every layer on two of them."""


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy over trained tokens; labels are already shifted."""
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)


def token_objective(hidden: Tensor, head: Head, fields: Mapping[str, Tensor]) -> Tensor:
    """The same of a last stage."""
    return token_loss(head(hidden), fields["labels"])


def kept_logits(kept: list[Tensor]) -> Objective:
    """An objective that appends the logits to `kept`, and returns their sum."""

    def keep(hidden: Tensor, head: Head, fields: Mapping[str, Tensor]) -> Tensor:
        logits = head(hidden)
        kept.append(logits.detach())
        return logits.sum()

    return keep


def packed_batch(vocab: int, *, batch: int = 2, length: int = 24, packed: bool = True) -> tuple[Tensor, Tensor]:
    """Ids, and labels stacked on position ids; with `packed` the rows hold documents of different lengths."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, vocab, (batch, length), generator=generator)
    labels = torch.roll(ids, -1, dims=1)
    labels[:, -1] = -100
    positions = torch.arange(length).repeat(batch, 1)
    if packed:
        for row in range(batch):
            for cut in (5 + 3 * row, 14 + row):
                positions[row, cut:] = torch.arange(length - cut)
                labels[row, cut - 1] = -100
    return ids, torch.stack([labels, positions])


def whole_loss_and_gradients(model: PreTrainedModel, ids: Tensor, integers: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of the plain model."""
    model.zero_grad()
    takes = accepted_arguments(model, model.base_model)
    arguments = {"position_ids": integers[1]} if "position_ids" in takes else {}
    arguments |= packing(model, integers[1])
    loss = token_loss(model(input_ids=ids, use_cache=False, **arguments).logits, integers[0])
    loss.backward()
    copies = model.all_tied_weights_keys  # whichever of a tied pair is registered first gives the name
    return loss.detach(), {copies.get(n, n): p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def load_chain(
    folder: Path,
    boundaries: list[int],
    *,
    objective: Objective = token_objective,
    head_apart: bool | None = None,
    in_halves: bool = False,
    share: SequenceShare | None = None,
    **keywords: Any,
) -> list[PipelineStage]:
    """All stages, each loaded on its own; with `in_halves` the boundaries count half layers."""
    options: dict[str, Any] = {"dtype": torch.float32, **keywords}
    return [
        PipelineStage(load_stage(folder, span, **options), span, objective, head_apart=head_apart, share=share)
        for span in spans_of(boundaries, in_halves=in_halves)
    ]


def chained_loss_and_gradients(
    stages: list[PipelineStage], ids: Tensor, integers: Tensor, between: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run the stages one after the other, cutting the graph between them as a pipeline does."""
    for stage in stages:
        stage.zero_grad()
    received, entering, leaving = ids, [], []
    for stage in stages[:-1]:
        output = stage((received, integers))
        assert isinstance(output, tuple)
        leaving.append(output[0])
        received, integers = output[0].detach().requires_grad_(), output[1]
        entering.append(received)
    loss = stages[-1]((received, integers))
    assert isinstance(loss, Tensor)
    loss.backward()
    for sent, got in zip(reversed(leaving), reversed(entering), strict=True):
        sent.backward(got.grad)
    gradients: dict[str, Tensor] = {}
    for stage in stages:
        names = published_names(stage.model, stage.span)
        for name, parameter in stage.model.named_parameters():
            if parameter.grad is not None:
                key = names[name]
                gradients[key] = gradients[key] + parameter.grad if key in gradients else parameter.grad.clone()
    return loss.detach(), gradients


def worst_gradient(expected: dict[str, Tensor], found: dict[str, Tensor]) -> tuple[float, str]:
    """(largest difference, its name); infinite where one side has a gradient that the other lacks.

    Differences are relative to the largest element of the gradient, where that is above 1.
    """
    if absent := expected.keys() ^ found.keys():
        return float("inf"), sorted(absent)[0]
    return max(
        ((expected[key] - found[key]).abs().max().item() / max(1.0, expected[key].abs().max().item()), key)
        for key in expected
    )


def tied_names(stages: list[PipelineStage]) -> list[str | None]:
    """What each stage says must be kept in sync."""
    found = [tied_parameter(stage.model, stage.span) for stage in stages]
    return [None if entry is None else entry[0] for entry in found]
